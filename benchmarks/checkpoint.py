"""How long a checkpoint of about 1 GB holds training up: written while training waits, and while it goes on.

    python benchmarks/checkpoint.py

The `tiny` preset with experts wide enough for the size, trained by this process; weights, Adam's moments and the
average are saved, to a temporary folder unless `--folder` names one. Wall time.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Report, parser
from benchmarks.timing import Spread
from model.diffusion_lm import DiffusionLM
from trainer import launch
from trainer.checkpoint import Saver
from trainer.config_load import load
from trainer.dry_run import longest_document
from trainer.ds_config import SHIPPED, load_ds_config
from trainer.engine import Engine
from trainer.randomness import training_draw

_BYTES_PER_PARAMETER = 20  # fp32: the weights twice, Adam's moments, the average
_SAVES = 4


class Trained:
    """An engine whose state takes about so many bytes, and a step to train it."""

    def __init__(self, size: float, ranks: launch.Ranks):
        small = load("tiny", overrides=["data.vocab_size=512", "model.moe.ffn=8"])
        per_ffn = 3 * small.model.width * small.model.moe.experts * small.model.layers
        ffn = int(size / _BYTES_PER_PARAMETER / per_ffn) // 8 * 8
        self.run = replace(small, model=replace(small.model, vocab_size=512, moe=replace(small.model.moe, ffn=ffn)))
        ds = load_ds_config(SHIPPED / ("cpu_zero2.json" if ranks.device.type == "cpu" else "zero2.json"))
        model = DiffusionLM(self.run.model)
        model.init_weights(0)
        self.engine, self.accumulation = Engine(model, self.run, ds, ranks), ds.accumulation
        self.device = ranks.device

    def step(self) -> None:
        """One training step on the shortest useful batch; the time it takes is mostly the optimizer's."""
        batch = longest_document(self.run)
        for index in range(self.accumulation):
            model = self.engine.model
            plan = model.prepare(batch, device=self.device, dtype=self.engine.dtype).to(self.device)
            draw = training_draw(batch, self.run.model, 0, 0).to(self.device)
            report = self.engine.forward(batch.to(self.device), plan, draw, 100.0, 100.0, 100.0)
            self.engine.backward(report)
            self.engine.accumulate(last=index == self.accumulation - 1)
        self.engine.update(0)


def seconds(action) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--gigabytes", type=float, default=1.0, help="size of the state (default: 1)")
    options.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = options.parse_args()
    report = Report("checkpoint", __doc__)
    ranks = launch.start()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        trained = Trained(1e9 * args.gigabytes, ranks)
        trained.step()  # makes Adam's moments
        saver = Saver(Path(folder), ranks, keep_last=1, keep_every=0)
        steps = iter(range(1, 100))
        alone = Spread.of([seconds(trained.step) for _ in range(_SAVES)])
        trained.engine.reserve_copies()

        def save(copies: bool) -> tuple[float, float, list[float]]:
            """(seconds until training may go on, until the checkpoint is there, of each step meanwhile)."""
            began = time.perf_counter()
            saver.start(next(steps), {}, trained.engine.state_files(copies))
            if not copies:
                saver.wait()
            stall, meanwhile = time.perf_counter() - began, []
            while saver.finished() is None and copies:
                meanwhile.append(seconds(trained.step))
            return stall, time.perf_counter() - began, meanwhile

        waiting = [save(copies=False)[0] for _ in range(_SAVES)]
        written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        first, *later = [save(copies=True) for _ in range(_SAVES)]
        meanwhile = [step for each in later for step in each[2]]
        report.row("size", "state on the disk", written / 1e9, "GB")
        report.row("waits", "training waits, saving at once", Spread.of(waiting), "s")
        report.row("first", "training waits, first save in the background", first[0], "s")
        stall, there = (Spread.of([each[index] for each in later]) for index in (0, 1))
        report.row("later", "training waits, later saves in the background", stall, "s")
        at_once = Spread.of(waiting).value
        report.row("first_share", "the first save in the background, of one at once", 100 * first[0] / at_once, "%")
        report.row("later_share", "later saves in the background, of one at once", stall.scaled(100 / at_once), "%")
        report.row("there", "until a checkpoint saved in the background is there", there, "s")
        report.row("step", "a step of training", alone, "s")
        report.row("step_meanwhile", "a step of training while a checkpoint is written", Spread.of(meanwhile), "s")
    report.write(args.json)
    launch.stop()


if __name__ == "__main__":
    main()
