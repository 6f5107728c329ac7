"""Traces on request: what a rank does in some steps, and how it uses CUDA memory meanwhile."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from model.errors import ConfigError

_MEMORY_EVENTS = 100_000


def step_range(text: str) -> range:
    """"a-b" -> steps a to b, both included; "" -> no steps. ConfigError for anything else."""
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if match is None or not 0 < int(match[1]) <= int(match[2]):
        raise ConfigError("train.profile_steps", f"must look like 20-22 (first and last step, from 1 on) or be empty, "
                          f"not '{text}'")
    return range(int(match[1]), int(match[2]) + 1)


class Profiler:
    """Records steps for chrome://tracing or Perfetto, `profile/steps-A-B.json`, and the CUDA memory of the same steps
    for https://pytorch.org/memory_viz, `profile/memory-A-B.pickle`."""

    def __init__(self, steps: range, memory: bool, run_dir: Path):
        self._steps, self._memory, self._folder = steps, memory, run_dir / "profile"
        self._profile: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Call before the work of a step, counted from 1."""
        if step not in self._steps or self._profile is not None:
            return
        if self._memory:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()

    def after(self, step: int) -> Path | None:
        """Call after the work of a step. The trace, where this was the last step of it."""
        if self._profile is None or step + 1 in self._steps:
            return None
        self._profile.stop()
        name = f"{self._steps[0]}-{self._steps[-1]}"
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"steps-{name}.json"
        self._profile.export_chrome_trace(str(path))
        self._profile = None
        if self._memory:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        return path
