"""Training with and without the load-balancing loss: how evenly experts are used, and what that costs.

    python benchmarks/balance.py --out runs/balance

Trains the `tiny` preset on the bundled documents twice at the same time, same seed and steps, once with
model.moe.balance_weight as it is and once with 0, each in one process on its share of the cores. Prints, for each
layer, the coefficient of variation (deviation / mean) of the tokens of its experts over the last 100 steps, and the
cross-entropy on held-out documents. The goals: below 0.5 in the worst layer, and a cross-entropy within 1 % of that of
the unbalanced run; the exit code is 1 if one is missed. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAST_STEPS = 100
MOST_VARIATION, MOST_COST = 0.5, 0.01
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "balance")
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    train(arguments.out.resolve(), arguments.steps)

    worst, loss = {}, {}
    print("balance loss  variation by layer        worst  cross-entropy (held out)")
    for name in RUNS:
        lines = [json.loads(line) for line in (arguments.out / name / "metrics.jsonl").read_text().splitlines()]
        by_layer = variations(lines)
        worst[name] = max(by_layer)
        loss[name] = [line for line in lines if line["kind"] == "eval"][-1]["cross_entropy_model"]
        print(f"{name:12}  {' '.join(f'{value:.3f}' for value in by_layer):24}  {worst[name]:.3f}  {loss[name]:.4f}")
    cost = loss["with"] / loss["without"] - 1
    even, cheap = worst["with"] < MOST_VARIATION, abs(cost) <= MOST_COST
    print(f"worst layer below {MOST_VARIATION}: {'yes' if even else 'no'}; cross-entropy differs by {cost:+.2%}, "
          f"at most {MOST_COST:.0%}: {'yes' if cheap else 'no'}")
    sys.exit(not (even and cheap))


if __name__ == "__main__":
    main()
