"""A test cluster and its jobs, from Python. What it is made of: `cluster.sh`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.trainer.launching import ROOT, command_line

SCRIPT = ROOT / "tests" / "slurm" / "cluster.sh"
NODES, SPARES = 8, 1
STATES_OF_ENDED_JOBS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}


class Cluster:
    """Nine nodes, named node1 to node9, of which a job takes the first eight that may be used."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, folder / "data"
        self.data.mkdir()
        # Ended with this process, however that ends.
        self._server = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", str(SCRIPT), str(folder), "up"],
                                        stdout=subprocess.PIPE, text=True)
        if self._server.stdout.readline().strip() != "ready":
            self._server.wait()
            raise RuntimeError("the test cluster does not come up; what its daemons said stands above")

    def close(self) -> None:
        self._server.terminate()
        self._server.wait()

    def wait_for_nodes(self) -> None:
        """Until all nodes are idle."""
        deadline = time.monotonic() + 60
        while len(self.do("exec", "sinfo", "-h", "-N", "-p", "main", "-t", "idle").splitlines()) < NODES + SPARES:
            assert time.monotonic() < deadline, self.do("exec", "sinfo", "-R")
            time.sleep(0.3)

    def do(self, action: str, *arguments: object, check: bool = True, env: dict | None = None) -> str:
        """An action of cluster.sh; its output. Fails with everything that was printed."""
        done = subprocess.run([str(SCRIPT), str(self.folder), action, *map(str, arguments)], cwd=ROOT, text=True,
                              capture_output=True, env={**os.environ, **(env or {})}, timeout=120)
        if check and done.returncode:
            raise RuntimeError(f"{action} {arguments}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout + (done.stderr if not check else "")

    def submit(self, run_dir: Path, ds: Path, settings: dict, *, sbatch: tuple[str, ...] = (),
               script: str = "train_8node.sh", **variables: str) -> Job:
        """Queues a training of one rank a node. settings: of the run; variables: of the job, such as PREFLIGHT."""
        env = {"PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PREFLIGHT": "nodes",
               "PREFLIGHT_SECONDS": "20", **variables}
        output = run_dir.with_suffix(".out")
        number = self.do("exec", "sbatch", "--parsable", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=1:00:00",
                         f"--output={output}", *sbatch, f"slurm/{script}", *command_line(ds, run_dir, settings),
                         env=env)
        return Job(self, number.strip(), run_dir, output)


@dataclass(frozen=True)
class Job:
    cluster: Cluster
    number: str
    run_dir: Path
    output: Path

    @property
    def facts(self) -> dict[str, str]:
        shown = self.cluster.do("exec", "scontrol", "-o", "show", "job", self.number).splitlines()[0]
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    @property
    def printed(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    @property
    def logs(self) -> list[Path]:
        """Of every attempt, the oldest first."""
        return sorted((self.run_dir / "logs" / self.number).glob("*restart-*"))

    def log(self, attempt: int = -1, rank: int = 0) -> str:
        return (self.logs[attempt] / f"rank-{rank:03d}.log").read_text(errors="replace")

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{self.describe()}"
            assert self.state not in STATES_OF_ENDED_JOBS, f"{what}: the job ended before\n{self.describe()}"
            time.sleep(0.3)

    def end(self, seconds: float = 480) -> str:
        """Waits for the job's last attempt; its state."""
        deadline = time.monotonic() + seconds
        while (state := self.state) not in STATES_OF_ENDED_JOBS:
            assert time.monotonic() < deadline, f"still {state} after {seconds} s\n{self.describe()}"
            time.sleep(0.3)
        return state

    def completed(self, seconds: float = 480) -> None:
        state = self.end(seconds)
        assert state == "COMPLETED", self.describe()

    @property
    def state(self) -> str:
        return self.facts["JobState"]

    def steps(self) -> int:
        """Lines of metrics so far; the last one may be only half there."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count('{"kind": "train"') if path.exists() else 0

    def wait_for_step(self, step: int, seconds: float = 240) -> None:
        self.wait(lambda: self.steps() >= step, seconds, f"step {step}")

    def status(self) -> str:
        return self.cluster.do("exec", "slurm/status.sh", self.number, env={"PYTHON": sys.executable})

    def describe(self) -> str:
        """Everything that a failed test should show."""
        logs = [path for attempt in self.logs for path in sorted(attempt.glob("*")) if path.is_file()]
        parts = [f"--- {path.relative_to(self.run_dir)}\n{path.read_text(errors='replace')[-2000:]}" for path in logs
                 if path.suffix == ".log" or path.suffix == ".verdict"]
        return "\n".join([self.state, self.printed, *parts])


def weights(run_dir: Path) -> bytes:
    return (run_dir / "model" / "model.safetensors").read_bytes()
