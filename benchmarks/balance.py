"""Training with and without the load-balancing loss: how evenly experts are used, and what that costs.

    python benchmarks/balance.py

Trains the `tiny` preset on the bundled documents twice at the same time, same seed and steps, once with
model.moe.balance_weight as it is and once with 0, each in one process on its share of the cores. Variation is the
coefficient (deviation / mean) of the tokens of a layer's experts over the last 100 steps; the cross-entropy is that on
held-out documents, a mean over noise levels. Interrupted, the same command goes on; `--out` holds the runs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import ROOT, Report, fingerprint, parser

LAST_STEPS = 100
RUNS = {"with": [], "without": ["--set", "model.moe.balance_weight=0.0"]}
"""Name -> arguments for trainer/run.py."""


def train(out: Path, steps: int) -> None:
    """Runs both to their end; exits naming the logs where one fails."""
    threads = max(1, len(os.sched_getaffinity(0)) // len(RUNS))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
    processes = []
    for name, arguments in RUNS.items():
        log = out / f"{name}.log"
        command = [sys.executable, "trainer/run.py", "--ds_config", "ds_configs/cpu_zero2.json", "--preset", "tiny",
                   "--run_dir", str(out / name), "--set", f"train.steps={steps}", "--set", "train.sample_every=0",
                   *arguments]
        print(f"training {name} the balance loss: {log}", flush=True)
        with log.open("w") as output:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output,
                                              stderr=subprocess.STDOUT))
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"a training failed: see {out}/*.log")


def variations(lines: list[dict]) -> list[float]:
    """Coefficient of variation of each layer's tokens per expert, over the last LAST_STEPS steps together."""
    lines = [line for line in lines if line["kind"] == "train"]
    last = [line["expert_tokens"] for line in lines if line["step"] > lines[-1]["step"] - LAST_STEPS]
    found = []
    for by_line in zip(*last, strict=True):
        tokens = [sum(of_expert) for of_expert in zip(*by_line, strict=True)]
        found.append(statistics.pstdev(tokens) / statistics.fmean(tokens))
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--out", type=Path, default=ROOT / "runs" / "balance")
    options.add_argument("--steps", type=int, default=400)
    arguments = options.parse_args()
    # Runs of other code or another length are not gone on with, nor taken for this one's.
    out = arguments.out.resolve() / f"{fingerprint('balance')}-{arguments.steps}"
    out.mkdir(parents=True, exist_ok=True)
    train(out, arguments.steps)

    report, rows, worst, loss = Report("balance", __doc__), [], {}, {}
    for name in RUNS:
        lines = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        by_layer = variations(lines)
        worst[name] = max(by_layer)
        loss[name] = [line for line in lines if line["kind"] == "eval"][-1]["cross_entropy_model"]
        rows.append([name, ", ".join(f"{value:.3f}" for value in by_layer), f"{loss[name]:.4f}"])
    report.table("Variation and cross-entropy", ["balance loss", "variation by layer", "cross-entropy"], rows)
    report.row("variation", "variation in the worst layer, with the balance loss", worst["with"], "")
    report.row("variation_without", "variation in the worst layer, without", worst["without"], "")
    report.row("cost", "cross-entropy with the balance loss, above that without", 100 * (loss["with"] / loss["without"]
                                                                                       - 1), "%")
    report.write(arguments.json)


if __name__ == "__main__":
    main()
