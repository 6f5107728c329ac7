"""A copy of the training state in host memory, taken while the state stands still, to be written while it moves on."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

Files = dict[str, object]
"""What `torch.save` is to write: path inside the checkpoint's folder -> state."""


class HostCopies:
    """Copies of states on the host. Their memory (pinned where the state is on a GPU) is kept from save to save: to
    allocate it anew costs up to ten times the copying."""

    def __init__(self) -> None:
        self._held: dict[str, list[torch.Tensor]] = {}
        self._reserving: threading.Thread | None = None

    def reserve(self, files: Files) -> None:
        """Begins to make the memory for copies of such states, and returns."""
        def make(place: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
            return place if place.is_pinned() else place.zero_()  # only what is written to is there

        def make_all() -> None:
            try:
                for name, state in files.items():
                    self._each(name, state, make)
            except RuntimeError:  # there is not enough memory: `take` will say so
                self._held.clear()

        self._reserving = threading.Thread(target=make_all, name="host copies", daemon=True)
        self._reserving.start()

    def take(self, name: str, state: object) -> object:
        """A copy of `state` that no later training step changes. It lasts until the next call with this name."""
        self.join()
        return self._each(name, state, lambda place, item: place.copy_(item.detach(), non_blocking=True))

    def join(self) -> dict[str, list[torch.Tensor]]:
        """Waits until the memory that is being reserved is there. All that is held: file's name -> its tensors."""
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        return self._held

    def _each(self, name: str, state: object, fill: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> object:
        """`state` with each tensor replaced by what `fill` makes of its place on the host and itself."""
        held, used, done = iter(self._held.get(name, [])), [], {}

        def copied(item: object) -> object:
            if isinstance(item, torch.Tensor):
                key = (item.data_ptr(), item.shape, item.stride(), item.dtype, item.device)
                if key not in done:
                    place = next(held, None)
                    if place is None or place.shape != item.shape or place.dtype != item.dtype:
                        place = torch.empty(item.shape, dtype=item.dtype, pin_memory=item.is_cuda)
                    used.append(place)
                    done[key] = fill(place, item)
                return done[key]
            if isinstance(item, dict):
                return type(item)((key, copied(value)) for key, value in item.items())
            if type(item) in (list, tuple):
                return type(item)(map(copied, item))
            return copy.deepcopy(item)

        result = copied(state)
        self._held[name] = used
        return result

    @staticmethod
    def finish() -> None:
        """Waits until the device has delivered all copies."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class RecordingEngine(CheckpointEngine):
    """DeepSpeed's way of writing a checkpoint that writes nothing: what it is given stands in `files`.

    keep: (file's name, state) -> what to keep of it. own_storage: whether each expert's state is to be in memory of its
    own, for which DeepSpeed clones it: otherwise every expert's file would hold all experts of its layer.
    """

    def __init__(self, folder: Path, keep: Callable[[str, object], object], own_storage: bool):
        super().__init__()
        self.files: Files = {}
        self._folder, self._keep, self._own_storage = folder, keep, own_storage

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Folders are made when the files are written."""

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to announce."""

    def save(self, state_dict: object, path: str) -> None:
        name = str(Path(path).relative_to(self._folder))
        self.files[name] = self._keep(name, state_dict)

    def load(self, path: str, map_location: object = None) -> object:
        raise NotImplementedError("only for saving")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True

    def preserves_storage_sharing(self) -> bool:
        return self._own_storage
