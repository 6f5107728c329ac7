"""The folder of one run: who owns it, what it was configured as, where it resumes, how it ended.

    config/     run.toml, deepspeed.json (both resolved), vocabulary.model, environment.json, code.diff; origin.json,
                the checkpoint that --resume CHECKPOINT began with
    metrics.jsonl, tb/     checkpoints/step-*     samples/     model/ (once finished)     status.json
    heartbeats/, logs/ (trainer/watchdog.py)     profile/     stop, save (trainer/signals.py)
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from model.errors import ConfigError
from trainer import checkpoint
from trainer.checkpoint_folder import by_step
from trainer.config import RunConfig, describe, to_toml
from trainer.config_load import load
from trainer.data.files import write_text_whole, write_whole
from trainer.data.vocabulary import Vocabulary
from trainer.ds_config import DSConfig
from trainer.errors import CheckpointError, storage_failure
from trainer.launch import Ranks

_REPOSITORY = Path(__file__).resolve().parents[1]
_LOCK_SECONDS = 60
_ORIGIN = Path("config", "origin.json")
_VOCABULARY = "vocabulary.model"
_FREE_TO_CHANGE = ("eval.", "sample.", "data.valid", "data.test", "data.cache_dir", "data.prefetch", "data.workers",
                   "data.vocabulary", "train.steps", "train.log_every", "train.eval_every", "train.sample_every",
                   "train.save_every", "train.keep_", "train.max_minutes", "train.activation_checkpointing",
                   "train.deterministic", "train.async_save", "train.max_skipped", "train.spike_limit",
                   "train.hang_minutes", "train.profile_", "train.expert_parallel_size")
"""Keys (by their beginning) that a resumed run may change: they do not alter what a step computes, only whether it is
applied. The number of steps stretches the learning rate's schedule, and is said aloud. Whether a vocabulary by another
name is the same one, `check_vocabulary` sees."""


class RunFolder:
    """resume: auto, none or a checkpoint's folder; init_from: an exported model's folder or None."""

    def __init__(self, path: Path, resume: str, init_from: Path | None):
        self.path, self.resume, self.init_from = path.absolute(), resume, init_from
        self._began = time.monotonic()
        self._lock = None
        self._origin: dict | None = None

    def open(self, run: RunConfig, ds: DSConfig, facts: dict, say: Callable[[str], None]) -> None:
        """Takes possession of the folder and writes down what runs here; only the first rank calls it. facts: what
        else belongs into environment.json.

        ConfigError where another process holds the folder, it cannot be written, or it belongs to another
        configuration.
        """
        config = self.path / "config"
        try:
            config.mkdir(parents=True, exist_ok=True)
            self._acquire(say)
            started = bool(by_step(self.path))
            if started and self.resume == "none":
                raise ConfigError("--resume", f"is none, but {self.path} holds checkpoints: choose another --run_dir, "
                                  "or auto to continue")
            if started:
                self._same_configuration(run, say)
            for leftover in config.glob("*.tmp-*"):  # of a start that was killed
                leftover.unlink()
            write_text_whole(config / "run.toml", to_toml(run))
            write_text_whole(config / "deepspeed.json", json.dumps(ds.values, indent=1) + "\n")
            write_text_whole(config / "environment.json", json.dumps({**facts, **_environment()}, indent=1) + "\n")
            write_text_whole(config / "code.diff", _git("diff", "HEAD"))
            for past in (self.path / "status.json", *(self.path / "heartbeats").glob("rank*.json")):
                past.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError("--run_dir", f"{self.path} cannot be written: {error.strerror or error}") from error

    def keep_vocabulary(self, vocabulary: Path) -> None:
        """Copies the run's vocabulary to its configuration, so that its checkpoints can be exported anywhere."""
        write_whole(self.path / "config" / _VOCABULARY, lambda file: file.write(vocabulary.read_bytes()))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around everything that writes here while training: CheckpointError where the disk takes no more."""
        try:
            yield
        except Exception as error:
            reason = storage_failure(error)
            if reason is None:
                raise
            raise CheckpointError(f"{self.path} cannot be written: {reason}. Make room and start again: the newest "
                                  "whole checkpoint is kept") from error

    def checkpoint(self, ranks: Ranks, say: Callable[[str], None]) -> tuple[Path, dict] | None:
        """Where to resume from, checked file by file, and its manifest, or None to begin at step 0. A collective.

        A run that has saved since it began with `resume` goes on with its own newest checkpoint: whatever starts it
        again repeats the same command.
        """
        if self.resume in ("auto", "none"):
            return checkpoint.find(self.path, ranks, say)
        folder = Path(self.resume).absolute()
        continued = on_first_rank(ranks, lambda: self._began_with(folder))
        found = checkpoint.find(self.path, ranks, say, continued) if continued else None
        if found is not None:
            say(f"this run began with {folder} and goes on with what it saved since; to begin with that again, delete "
                f"{self.path / _ORIGIN}")
            return found
        manifest = checkpoint.check(folder, ranks)
        # Checkpoints carry the name of their continuation, because the folder may still hold those of another one.
        self._origin = {"path": str(folder), "sha256": checkpoint.identity(folder), "continuation": uuid.uuid4().hex}
        return folder, manifest | {"continuation": self._origin["continuation"]}

    def keep_origin(self) -> None:
        """Writes down which checkpoint the run began with, once that is loaded. Only the first rank calls it."""
        if self._origin is not None:
            write_text_whole(self.path / _ORIGIN, json.dumps(self._origin, indent=1) + "\n")

    def _began_with(self, folder: Path) -> str | None:
        """The name of the continuation if the run began with this checkpoint, which may be gone meanwhile."""
        try:
            origin = json.loads((self.path / _ORIGIN).read_text())
        except FileNotFoundError:
            return None
        digest = checkpoint.identity(folder)
        same = origin["path"] == str(folder) if digest is None else origin["sha256"] == digest
        return origin["continuation"] if same else None

    def newest_step(self) -> int:
        """Of the newest checkpoint, whole or not; 0 if there is none."""
        return max(by_step(self.path), default=0)

    def mark(self, status: str, step: int, reason: str | None) -> None:
        """Writes status.json, which launchers read: done; preempted (to be started again); or stopped (by the file
        `stop`, not to be started again by itself)."""
        text = json.dumps({"status": status, "step": step, "reason": reason})
        write_text_whole(self.path / "status.json", text + "\n")

    def seconds(self) -> float:
        """Since this process opened the run."""
        return round(time.monotonic() - self._began, 2)

    def _acquire(self, say: Callable[[str], None]) -> None:
        """One run a folder: a run that was just interrupted may still be saving, so it is waited for."""
        self._lock = (self.path / ".lock").open("w")
        for second in range(_LOCK_SECONDS):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if second == 0:
                    say(f"waiting up to {_LOCK_SECONDS} s for another process that still uses {self.path}")
                time.sleep(1)
        raise ConfigError("--run_dir", f"{self.path} is in use by another process: wait for it, end it or "
                          "choose another --run_dir")

    def _same_configuration(self, run: RunConfig, say: Callable[[str], None]) -> None:
        before = {key.name: key.default for key in describe(load(file=self.path / "config" / "run.toml"))}
        changed = {key.name: (before[key.name], key.default) for key in describe(run)
                   if before[key.name] != key.default}
        bound = [f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items()
                 if not name.startswith(_FREE_TO_CHANGE)]
        if bound:
            raise ConfigError("--run_dir", f"{self.path} belongs to another configuration ({'; '.join(bound[:3])}): "
                              "choose another --run_dir, or start as before")
        for name, (old, new) in changed.items():
            say(f"resuming with {name} = {new!r} (was {old!r})")


def model_facts(run: RunConfig, model: torch.nn.Module) -> dict:
    """What a checkpoint's manifest says of its model. model: whole, before its experts or weights are divided."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    return {"model": {key.name: key.default for key in describe(run.model, "model.")},
            "weights": hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()}


def check_model(path: Path, manifest: dict, here: dict, say: Callable[[str], None]) -> None:
    """Refuses, with CheckpointError, to resume a checkpoint at `path` whose weights have other names or shapes than
    `here`, of `model_facts`, says; tells of all else that differs. Manifests of earlier versions say nothing of it."""
    if "weights" not in manifest:
        return
    saved = manifest["model"]
    changed = {name: (saved[name], new) for name, new in here["model"].items() if saved.get(name, new) != new}
    if manifest["weights"] != here["weights"]:
        differs = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items())
        raise CheckpointError(f"{path} holds the weights of another model ({differs or 'of another version'}): start "
                              "it as it was saved, or begin a new run without --resume")
    for name, (old, new) in changed.items():
        say(f"resuming with {name} = {new!r} (was {old!r})")


def check_vocabulary(weights: Path, digest: str | None, folders: list[Path], vocabulary: Vocabulary) -> None:
    """Refuses, with CheckpointError, to go on with the weights at a path in another vocabulary than their own, whose
    ids mean other tokens.

    digest: of their own; None where nothing says it, as in manifests of earlier versions. It is then that of the first
    vocabulary kept in one of the `folders`, and where none is, nothing is refused.
    """
    paths = [folder / _VOCABULARY for folder in folders]
    kept = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}
    own = digest or next(iter(kept.values()), None)
    if own in (None, vocabulary.digest):
        return
    place = next((path for path, each in kept.items() if each == own), f"the {_VOCABULARY} that it was trained with")
    raise CheckpointError(f"{weights} was trained with another vocabulary than {vocabulary.path}, whose ids mean other "
                          f"tokens: set data.vocabulary = {place}")


def on_first_rank(ranks: Ranks, action: Callable[[], Any]) -> Any:
    """Runs `action` on the first rank while the others wait; returns its result, or raises its error, on all."""
    outcome: list = [None, None]
    if ranks.first:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _environment() -> dict:
    packages = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {"executable": sys.executable, "commit": _git("rev-parse", "HEAD").strip(),
            "host": platform.node(), "platform": platform.platform(), "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower()))}


def _git(*arguments: str) -> str:
    """Output of git in the program's repository; empty where it is no git checkout."""
    try:
        return subprocess.run(["git", "-C", str(_REPOSITORY), *arguments], capture_output=True, text=True,
                              timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
