"""Files that are read without being held in memory, and results that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model.errors import ConfigError
from trainer.data.files import sync
from trainer.errors import CheckpointError, storage_failure

_SAFETENSORS = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16",
                torch.int64: "I64"}

Tensors = dict[str, tuple[torch.dtype, torch.Size, Iterable[Tensor]]]
"""Name -> type, shape, and consecutive pieces of the flattened tensor, which are read when they are written."""

CHUNK = 1 << 24
"""Elements that are converted to another type at a time."""


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file or a folder at, which takes the name `target` if all went well and is
    removed otherwise. ConfigError if `target` exists or cannot be made, CheckpointError if the disk is full."""
    target = target.absolute()
    if target.exists() or target.is_symlink():
        raise ConfigError("TO", f"{target} exists: remove it, or choose another place")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".converting-{target.name}-", dir=target.parent))
    except OSError as error:
        raise ConfigError("TO", f"{target} cannot be written: {error.strerror or error}") from error
    try:
        result = room / target.name
        yield result
        for path in sorted(result.rglob("*")) if result.is_dir() else [result]:
            sync(path)
        result.rename(target)
        sync(target.parent)
    except Exception as error:
        reason = storage_failure(error)
        if reason is None:
            raise
        raise CheckpointError(f"{target} cannot be written: {reason}. Nothing was converted") from error
    finally:
        shutil.rmtree(room, ignore_errors=True)


def load(path: Path) -> object:
    """What `torch.save` wrote, its tensors left in the file until they are used. CheckpointError if that fails."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is not whole") from None
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def scratch(numel: int, dtype: torch.dtype, folder: Path) -> Tensor:
    """A flat tensor of zeros that lies in a file without name in `folder`, so that the system can take its memory
    back whenever it needs some."""
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, numel * dtype.itemsize)  # a full disk would end the process later
        return torch.from_file(file.name, shared=True, size=numel, dtype=dtype)


def fill(out_N: Tensor, pieces: Iterable[Tensor]) -> Tensor:
    """Copies consecutive pieces of a flat tensor into `out_N` from its beginning on, and returns it."""
    offset = 0
    for piece in pieces:
        out_N[offset:offset + len(piece)] = piece
        offset += len(piece)
    return out_N


def write_safetensors(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Writes a safetensors file, reading the pieces one at a time."""
    header: dict = {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape, _) in tensors.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape, pieces) in tqdm(tensors.items(), desc="writing", unit="tensor", leave=False):
            before = file.tell()
            for piece in pieces:
                for part in piece.split(CHUNK):
                    file.write(memoryview(part.to(dtype).contiguous().view(torch.uint8).numpy()))
            written = file.tell() - before
            if written != shape.numel() * dtype.itemsize:
                raise CheckpointError(f"{name}: {written} bytes for a tensor of shape {list(shape)}")
        file.flush()
        os.fsync(file.fileno())
