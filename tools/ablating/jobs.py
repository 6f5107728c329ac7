"""One run of a grid from its speed to its measures, each step only if it was not done before."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from model.errors import ConfigError
from tools.ablating.children import Children
from tools.ablating.documents import TEST
from tools.ablating.grid import Run, Sampler, as_overrides, file_name
from tools.ablating.levels import ACCURACIES
from tools.generating.identity import digest
from trainer.config import describe
from trainer.config_load import load
from trainer.data.files import write_text_whole
from trainer.errors import RunError

CLOCK = "seconds" if torch.cuda.is_available() else "cpu_seconds"
"""What training time is measured in: a CPU that others use as well makes the clock unfair."""
_SPEED_LOG_EVERY, _SPEED_LINES, _SPEED_SECONDS = 4, 4, 12.0
_SAVES = 5


_FREE_TO_CHANGE = ("sample.", "eval.", "train.log_every", "train.save_every", "train.keep_last", "train.eval_every",
                   "train.sample_every")
"""Keys (by their beginning) that a trained model does not depend on."""
MEASURES, LEVELS = "measured", "levels.json"
"""Below a run's folder: what was measured of its model; in it, apart from samplers."""


def measured_with(path: Path, facts: dict) -> dict | None:
    """What measure.py wrote to a file; None if it is not there, or was measured with other facts."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("facts") == facts else None


class JobFailed(RunError):
    """A run that could not be trained or measured; the other runs go on."""


@dataclass
class Job:
    """A run in its folder. data: the settings `data.*` of its set. children: starts programs."""

    run: Run
    out: Path
    data: dict[str, str]
    children: Children

    @property
    def cell_folder(self) -> Path:
        return self.out / "runs" / file_name(self.run.data_name) / file_name(self.run.cell.name)

    @property
    def folder(self) -> Path:
        return self.cell_folder / f"seed-{self.run.seed}"

    def measure_speed(self) -> None:
        """Trains for a few seconds and keeps how many steps a second of CLOCK takes, in the cell's folder."""
        path, facts = self.cell_folder / "speed.json", {"trained": self._trained_digest()}
        if measured_with(path, facts) or not self.run.grid.minutes:
            return
        trial = self.cell_folder / "speed"
        shutil.rmtree(trial, ignore_errors=True)  # of one that was interrupted
        wanted = min(_SPEED_SECONDS, 0.1 * 60 * self.run.grid.minutes)

        def enough() -> bool:
            lines = train_lines(trial)
            return len(lines) >= _SPEED_LINES and _spent(lines)[1] >= wanted

        self._train(trial, 10**6, enough, log_every=_SPEED_LOG_EVERY, save_every=0)
        steps, seconds = _spent(train_lines(trial))
        write_text_whole(path, json.dumps({"facts": facts, "steps_per_second": steps / seconds}))
        shutil.rmtree(trial)

    def execute(self) -> None:
        """Trains to the end of the budget, generates and scores."""
        self._describe()
        if not self.finished:
            steps = self.steps
            self._train(self.folder, steps, lambda: False, log_every=max(1, min(50, steps // 20)),
                        save_every=max(20, steps // _SAVES))
            if not self.finished:
                raise JobFailed("was stopped before its end; run again to continue")
        if not self._measured:
            self._start([sys.executable, "tools/ablating/measure.py", str(self.folder)], lambda: False)

    @property
    def finished(self) -> bool:
        """Whether training has come to its end."""
        path = self.folder / "status.json"
        return path.exists() and json.loads(path.read_text())["status"] == "done" and (self.folder / "model").is_dir()

    @property
    def _measured(self) -> bool:
        return self.levels() is not None and all(self.measures(each) is not None for each in self.run.samplers)

    def measures(self, sampler: Sampler) -> dict | None:
        """What was measured of the model's texts by a sampler; None if they were not written yet, or otherwise."""
        return measured_with(self.folder / MEASURES / f"{file_name(sampler.name)}.json", self.sampler_facts(sampler))

    def levels(self) -> dict | None:
        """What was measured at the noise levels of ACCURACIES; None if it was not yet, or otherwise."""
        return measured_with(self.folder / MEASURES / LEVELS, self.level_facts())

    def sampler_facts(self, sampler: Sampler) -> dict:
        """All that the measures of a sampler depend on beside the model, ready for JSON."""
        how = replace(self.run.config().sample, seed=self.run.seed, **sampler.settings)
        return {"sample": asdict(how), "task": self.run.data.task, "documents": digest([self.test / TEST])}

    def level_facts(self) -> dict:
        """The same for the noise levels."""
        return {"accuracies": list(ACCURACIES), "documents": self.run.config().eval.documents,
                "valid": digest([Path(self.data["data.valid"])])}

    @property
    def test(self) -> Path:
        """The folder of the set, for `Test.read`."""
        return Path(self.data["data.test"]).parent

    @property
    def progress(self) -> float:
        """Share of the training that is done."""
        if self.finished:
            return 1.0
        lines = train_lines(self.folder)
        return lines[-1]["step"] / self.steps if lines else 0.0

    @property
    def steps(self) -> int:
        """That the budget allows."""
        grid = self.run.grid
        if grid.tokens:
            return max(1, round(grid.tokens / self.run.config().data.row_tokens))
        speed = json.loads((self.cell_folder / "speed.json").read_text())["steps_per_second"]
        return max(1, round(60 * grid.minutes * speed))

    def _trained_settings(self, **more: object) -> dict[str, object]:
        """Keys of the configuration that a trained model depends on; more: of `train`."""
        config = self.run.config({**self.data, **{f"train.{name}": value for name, value in more.items()}})
        return {key.name: key.default for key in describe(config) if not key.name.startswith(_FREE_TO_CHANGE)}

    def _trained_on(self) -> str:
        """Digest of the training documents."""
        return digest([Path(self.data["data.train"])])

    def _trained_digest(self) -> str:
        """Of all that the cell's speed depends on."""
        settings = json.dumps(self._trained_settings(), default=str) + self._trained_on()
        return hashlib.sha256(settings.encode()).hexdigest()

    def _describe(self) -> None:
        """Writes job.json, which measure.py reads; ConfigError where the folder was trained otherwise."""
        config, description = self.folder / "config" / "run.toml", self.folder / "job.json"
        trained_on = self._trained_on()
        if config.exists():
            before = {key.name: key.default for key in describe(load(file=config))}
            now = self._trained_settings(seed=self.run.seed, steps=self.steps)
            changed = [f"{name} = {before[name]!r} (now {value!r})" for name, value in now.items()
                       if before[name] != value]
            if not description.exists() or json.loads(description.read_text()).get("trained_on") != trained_on:
                changed.append(f"other documents than {self.data['data.train']} holds now")
            if changed:
                raise ConfigError("--out", f"{self.folder} was trained with {'; '.join(changed[:3])}: choose another "
                                  f"folder, or remove {self.cell_folder}")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text_whole(description, json.dumps({
            "trained_on": trained_on, "test": str(self.test), "levels": self.level_facts(),
            "samplers": [{"file": file_name(each.name), "facts": self.sampler_facts(each)}
                         for each in self.run.samplers]}, indent=1))

    def _train(self, folder: Path, steps: int, enough: Callable[[], bool], log_every: int, save_every: int) -> None:
        cell, grid = self.run.cell, self.run.grid
        folder.mkdir(parents=True, exist_ok=True)
        settings = {**self.run.overrides, **self.data, "train.seed": self.run.seed, "train.steps": steps,
                    "train.log_every": log_every, "train.save_every": save_every, "train.keep_last": 1,
                    "train.eval_every": 0, "train.sample_every": 0}
        recipe = cell.recipe or grid.recipe
        command = [sys.executable, "trainer/run.py", "--ds_config", str(deepspeed_file(self.out)),
                   "--preset", cell.preset or grid.preset, *(["--recipe", recipe] if recipe else []),
                   "--run_dir", str(folder), *(word for text in as_overrides(settings) for word in ("--set", text))]
        self._start(command, enough)

    def _start(self, command: Sequence[str], enough: Callable[[], bool]) -> None:
        log = self.cell_folder / f"seed-{self.run.seed}.log"
        code = self.children.run(command, log, enough)
        if code:
            said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
            raise JobFailed(f"{said[-1].removeprefix('error: ') if said else f'exit code {code}'} ({log})")


def deepspeed_file(out: Path) -> Path:
    """The DeepSpeed JSON of every run."""
    path = out / "deepspeed.json"
    if not path.exists():
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}
        path.write_text(json.dumps(config | ({"bf16": {"enabled": True}} if torch.cuda.is_available() else {})))
    return path


def train_lines(folder: Path) -> list[dict]:
    """Whole lines of a run's metrics about training, so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def training_seconds(lines: Sequence[dict], clock: str) -> float:
    """Time spent in the steps of a finished run, without starts and interruptions: what lies between two lines, and
    for steps without a line before them the mean."""
    spans = [(after["step"] - before["step"], after[clock] - before[clock]) for before, after in pairwise(lines)
             if after[clock] > before[clock]]
    if not spans:
        return lines[-1][clock]
    steps, seconds = map(sum, zip(*spans, strict=True))
    return seconds / steps * lines[-1]["step"]


def _spent(lines: Sequence[dict]) -> tuple[int, float]:
    """Steps and seconds since the first line: what comes before is slower."""
    return lines[-1]["step"] - lines[0]["step"], lines[-1][CLOCK] - lines[0][CLOCK]
