"""Tokens a second with one rank and with several, by ZeRO stage, and with the experts divided among the ranks.

    python benchmarks/scaling.py

The `tiny` preset on the bundled documents, started as a user starts it; every rank has one thread and as many tokens a
step as the others, however many there are. Speed is taken from `metrics.jsonl`, by wall time, without the first lines.
With more ranks than cores the figures say nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import ROOT, Report, parser
from benchmarks.timing import Spread

LOG_EVERY, FIRST_LINES = 5, 2


def tokens_per_second(folder: Path, ranks: int, stage: int, expert_parallel: int, steps: int) -> Spread:
    """Exits with the run's output where it fails."""
    ds = json.loads((ROOT / "ds_configs" / "cpu_zero2.json").read_text())
    ds["zero_optimization"]["stage"] = stage
    run_dir = folder / f"{ranks}-{stage}-{expert_parallel}"
    run_dir.mkdir()
    (run_dir / "ds.json").write_text(json.dumps(ds))
    settings = {"train.steps": steps, "train.log_every": LOG_EVERY, "train.eval_every": 0, "train.sample_every": 0,
                "train.save_every": 0, "train.expert_parallel_size": expert_parallel,
                "data.cache_dir": folder / "cache"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
         str(ROOT / "trainer" / "run.py"), "--ds_config", str(run_dir / "ds.json"), "--preset", "tiny", "--run_dir",
         str(run_dir / "run"), *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        sys.exit(f"training with {ranks} ranks, ZeRO stage {stage} failed:\n{done.stdout}{done.stderr}")
    lines = map(json.loads, (run_dir / "run" / "metrics.jsonl").read_text().splitlines())
    return Spread.of([line["tokens_per_s"] for line in lines if line["kind"] == "train"][FIRST_LINES:])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--ranks", type=int, default=2, help="how many ranks are compared with one (default: 2)")
    options.add_argument("--steps", type=int, default=30, help=f"of each run, more than {FIRST_LINES * LOG_EVERY}")
    arguments = options.parse_args()
    if arguments.steps <= FIRST_LINES * LOG_EVERY:
        options.error(f"--steps must be more than {FIRST_LINES * LOG_EVERY}, whose lines are left out")
    report = Report("scaling", __doc__)
    several = arguments.ranks
    with tempfile.TemporaryDirectory() as folder:
        def measured(ranks: int, stage: int, expert_parallel: int = 1) -> Spread:
            return tokens_per_second(Path(folder), ranks, stage, expert_parallel, arguments.steps)

        alone = measured(1, 2)
        report.row("1", "one rank, ZeRO-2", alone, "tokens/s")
        for stage in (1, 2, 3):
            together = measured(several, stage)
            report.row(f"{several}.zero{stage}", f"{several} ranks, ZeRO-{stage}", together, "tokens/s")
            report.row(f"{several}.zero{stage}.of_ideal", f"{several} ranks, ZeRO-{stage}, of {several} times one rank",
                       100 * together.value / (several * alone.value), "%")
        report.row(f"{several}.experts", f"{several} ranks, ZeRO-2, experts divided among them",
                   measured(several, 2, several), "tokens/s")
    report.write(arguments.json)


if __name__ == "__main__":
    main()
