"""How a run is doing, in one line, and how one attempt of a job ended.

    python tools/cluster/progress.py status RUN_DIR LOGS     step, loss, speed, newest checkpoint, first failure
    python tools/cluster/progress.py checkpoint RUN_DIR      the step of the newest checkpoint, 0 without
    python tools/cluster/progress.py ending RUN_DIR LOGS --srun CODE [--asked]
                                                             finished, requeue, stopped, or failed with an exit code

LOGS is the folder of one attempt: `rank-NNN.log` of every rank, and `srun.log`, where SLURM says who ended how. This
only reads.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import json
import re
import signal
import tomllib
from typing import NamedTuple

from tools.command import run
from trainer.checkpoint_folder import completed
from trainer.errors import ExitCode
from trainer.parser import Parser

_TASKS = re.compile(r"srun: error: (?P<nodes>[^:]+): tasks? (?P<tasks>[\d,-]+): (?P<how>.*)")
_EXITED = re.compile(r"Exited with exit code (\d+)")
_SIGNALS = {signal.strsignal(number): number for number in signal.valid_signals()}
_REQUEUED_REASONS = ("SIGUSR1", "SIGTERM")
"""Requests to save that come from SLURM: the time limit and preemption. Others (a time budget, a key pressed) come from
the user, and end the job."""


class Failure(NamedTuple):
    """Of the rank that failed first."""

    rank: int
    node: str
    text: str
    code: int


def last_line(path: Path, kind: str) -> dict:
    """The last whole record of a kind in metrics.jsonl."""
    found = {}
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            if f'"kind": "{kind}"' in line and line.endswith("}"):
                found = json.loads(line)
    return found


def newest_checkpoint(run_dir: Path) -> int:
    """Its step; 0 without any."""
    return max(completed(run_dir), default=0)


def first_failure(logs: Path) -> Failure | None:
    """Who failed first, and with which words.

    The trainer lets only one rank speak. A rank that could not speak (it was killed, it crashed) is known to SLURM
    alone. Other ranks' "lost another rank" and what srun itself ended afterwards are consequences.
    """
    said = {int(path.stem.removeprefix("rank-")): _error_line(path) for path in sorted(logs.glob("rank-*.log"))}
    ends = _ends(logs)
    codes = {end.rank: end.code for end in ends}
    lost = {rank for rank, text in said.items() if text and codes.get(rank) == ExitCode.COMMUNICATION}
    for rank, text in said.items():
        if text and rank not in lost:
            return Failure(rank, _node(logs, rank), text, codes.get(rank, ExitCode.UNEXPECTED))
    for end in [*(end for end in ends if end.code > 128), *(end for end in ends if end.rank not in lost)]:
        return end if end.code > 128 else end._replace(text=f"{end.text}: {_final_words(logs, end.rank)}")
    for rank in sorted(lost):
        return Failure(rank, _node(logs, rank), said[rank], codes[rank])
    return None


def _ends(logs: Path) -> list[Failure]:
    """What srun says of tasks that did not end well, in its order."""
    found, path = [], logs / "srun.log"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        if match := _TASKS.match(line):
            exited = _EXITED.match(match["how"])
            code = int(exited[1]) if exited else 128 + _SIGNALS.get(match["how"].partition(" (")[0], signal.SIGKILL)
            for part in match["tasks"].split(","):
                first, _, last = part.partition("-")
                found += [Failure(rank, _node(logs, rank) or match["nodes"], match["how"], code)
                          for rank in range(int(first), int(last or first) + 1)]
    return found


def _error_line(path: Path) -> str:
    lines = re.findall(r"^error: (.*)$", path.read_text(errors="replace"), flags=re.MULTILINE)
    return lines[0] if lines else ""


def _final_words(logs: Path, rank: int) -> str:
    path = logs / f"rank-{rank:03d}.log"
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")


def _node(logs: Path, rank: int) -> str:
    """As the first line of its log says (`slurm/lib/rank.sh`); empty without a log."""
    path = logs / f"rank-{rank:03d}.log"
    if not path.exists():
        return ""
    with path.open(errors="replace") as file:
        return file.readline().rpartition(" on ")[2].strip()


def status(run_dir: Path, logs: Path) -> str:
    """One line. Parts of which nothing is known yet are left out."""
    train, config = last_line(run_dir / "metrics.jsonl", "train"), run_dir / "config" / "run.toml"
    parts = []
    if train:
        last = tomllib.loads(config.read_text())["train"]["steps"] if config.exists() else "?"
        parts += [f"step {train['step']}/{last}", f"loss {train['loss']:.4f}", f"{train['tokens_per_s']:,.0f} tokens/s"]
    else:
        parts.append("no step yet")
    saved = newest_checkpoint(run_dir)
    parts.append(f"last checkpoint step {saved}" if saved else "no checkpoint yet")
    failure = first_failure(logs)
    if failure is not None:
        parts.append(f"rank {failure.rank} on {failure.node} failed first: {failure.text}")
    return " | ".join(parts)


def ending(run_dir: Path, logs: Path, srun: int, asked: bool) -> tuple[str, int]:
    """What became of an attempt, and the exit code of the job if this was its last.

    srun: its exit code. asked: whether the job's script passed on a request to save. srun's code alone says little:
    with --kill-on-bad-exit it is that of the ranks which srun ended.
    """
    marker = run_dir / "status.json"
    left = json.loads(marker.read_text()) if marker.exists() else {}
    if srun == 0 and left.get("status") == "done":
        return "finished", ExitCode.FINISHED
    if srun == 0 and left.get("status") == "preempted" and (asked or left.get("reason") in _REQUEUED_REASONS):
        return "requeue", ExitCode.FINISHED
    if srun == 0 and left.get("status") in ("preempted", "stopped"):
        return "stopped", ExitCode.FINISHED
    failure = first_failure(logs)
    return "failed", failure.code if failure else srun or ExitCode.UNEXPECTED


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("status", "checkpoint", "ending"):
        command = commands.add_parser(name)
        command.add_argument("run_dir", type=Path)
        if name != "checkpoint":
            command.add_argument("logs", type=Path)
        if name == "ending":
            command.add_argument("--srun", type=int, required=True, help="exit code of srun")
            command.add_argument("--asked", action="store_true", help="the ranks were asked to save")
    args = parser.parse_args()
    if args.command == "status":
        print(status(args.run_dir, args.logs))
    elif args.command == "checkpoint":
        print(newest_checkpoint(args.run_dir))
    else:
        print(*ending(args.run_dir, args.logs, args.srun, args.asked))


if __name__ == "__main__":
    run(main)
