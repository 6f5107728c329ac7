"""Generates for parts of what is asked, in this process or in several."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model.allocator import keep_freed_memory
from model.diffusion_lm import DiffusionLM
from model.sampling import SamplerSettings
from tools.generating.asked import Source
from trainer.data.vocabulary import Vocabulary
from trainer.data.workers import fresh_workers
from trainer.export import read_model
from trainer.generate import GappedText, emergence, generate, infill
from trainer.hardware import use_deterministic_kernels


@dataclass(frozen=True)
class Writer:
    """A model and how to generate with it. Sent to other processes; each loads the model when it first needs it.

    dtype: as `read_model` takes it. deterministic: with kernels, on one thread, that give the same bits every time.
    """

    folder: Path
    device: str
    dtype: str
    settings: SamplerSettings
    candidates: int
    deterministic: bool

    def write(self, tasks: Sequence[Source | GappedText]) -> list[dict]:
        """Records of tasks of one kind, all in one forward pass a step."""
        model, vocabulary, canvas = _load(self.folder, self.device, self.dtype, self.deterministic)
        device = torch.device(self.device)
        if isinstance(tasks[0], GappedText):
            return list(infill(model, vocabulary, tasks, self.settings, device=device, texts_per_batch=len(tasks)))
        return list(generate(model, vocabulary, tasks, canvas, self.settings, device=device,
                             candidates=self.candidates, documents_per_batch=len(tasks)))

    def emergence(self, task: Source) -> dict:
        """How one text emerges."""
        model, vocabulary, canvas = _load(self.folder, self.device, self.dtype, self.deterministic)
        return emergence(model, vocabulary, task, canvas, self.settings, device=torch.device(self.device))


@functools.cache
def _load(folder: Path, device: str, dtype: str, deterministic: bool) -> tuple[DiffusionLM, Vocabulary, int]:
    """The model, its vocabulary and the length of its canvas."""
    keep_freed_memory()
    if deterministic:
        torch.set_num_threads(1)
        use_deterministic_kernels()
    model, vocabulary, run = read_model(folder, device, dtype)
    return model, vocabulary, run.data.max_target_tokens


def written(writer: Writer, parts: Iterable[Sequence[Source | GappedText]], processes: int) -> Iterator[list[dict]]:
    """The records of every part, in order. Processes share the cores, and take turns with all GPUs."""
    if processes == 1:
        yield from map(writer.write, parts)
        return
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    with fresh_workers(processes, "--processes", _begin, (writer.device, threads)) as workers:
        yield from workers.map(writer.write, parts)


def _begin(index: int, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.set_device(index % torch.cuda.device_count())
