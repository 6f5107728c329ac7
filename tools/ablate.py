"""Compare ways to train and to generate on equal budgets: run a grid, one table and plots out.

    python tools/ablate.py benchmarks/grids/absorbing.toml --data my/data
    python tools/ablate.py benchmarks/grids/switches.toml --minutes 1 --seeds 1 --documents 50      # a quick look

Trains every cell of the grid with every seed in processes of one thread, several at a time; generates with every
sampler; scores beside trivial systems. Interrupted, the same command goes on. Writes NAME.json, NAME.md and NAME-*.svg
to --out, and the runs' folders, which grids with the same cells may share. How grids are written: docs/ablations.md.

Exit codes: 0 all runs are finished; 1 some failed, or a defect of this program; 80 the command line or the grid asks
for something that cannot work; 81 documents are missing or faulty; 130 interrupted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import os
import shlex
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from tqdm import tqdm

from model.errors import ConfigError
from tools.ablating import documents, page
from tools.ablating.children import Children
from tools.ablating.documents import ROOT
from tools.ablating.grid import Grid
from tools.ablating.grid_file import read_grid
from tools.ablating.jobs import Job, deepspeed_file
from tools.ablating.results import collect
from tools.command import run, writing
from trainer.parser import Parser

_TRAINING = 0.9
"""Share of a run's time that goes into training, for the progress bar."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, metavar="GRID", help="a grid file, .toml")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/ablations/ and the grid's name")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="folder that holds the sets' folders; those that "
                        "come with the repository are found without")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: the cores)")
    parser.add_argument("--page", type=Path, metavar="DIR", help="also write the table and plots there")
    less = parser.add_argument_group("in place of what the grid says")
    less.add_argument("--minutes", type=float, help="of training for each run")
    less.add_argument("--tokens", type=int, help="of training for each run, instead of minutes")
    less.add_argument("--seeds", type=int, metavar="N", help="only the first N")
    less.add_argument("--documents", type=int, metavar="N", help="test documents of each set")
    less.add_argument("--sets", nargs="+", metavar="NAME", help="only these of the grid's data sets")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    cores = len(os.sched_getaffinity(0))
    slots = cores if args.jobs is None else args.jobs
    if not 1 <= slots <= cores:
        raise ConfigError("--jobs", f"is {slots}, but this process may use {cores} cores: give 1 to {cores}")
    grid = read_grid(args.grid, minutes=args.minutes, tokens=args.tokens, seeds=args.seeds, documents=args.documents,
                     data=args.sets)
    name = args.grid.stem
    out = (args.out or Path("runs", "ablations", name)).absolute()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if args.page:
        with writing("--page", args.page):
            args.page.mkdir(parents=True, exist_ok=True)
    jobs = planned(grid, args.data, out)
    failed = execute(jobs, slots)
    if len(failed) == len(jobs):
        print("error: every run failed, see above: there is no page; the same command tries them again",
              file=sys.stderr)
        sys.exit(1)
    results = collect(grid, [job for job in jobs if job not in failed], command(args))
    with writing("--out", out):
        (out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        written = page.write(results, out, name)
    if args.page:
        with writing("--page", args.page):
            written = page.write(results, args.page, name)
    print(written.read_text())
    print(f"page in {written}")
    if failed:
        print(f"error: {len(failed)} of {len(jobs)} runs failed, see above; the same command tries them again",
              file=sys.stderr)
        sys.exit(1)


def command(args: argparse.Namespace) -> str:
    """What repeats the comparison, on any machine."""
    path = args.grid.absolute()
    words = ["python", "tools/ablate.py", str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name)]
    words += ["--data", "DIR"] if args.data else []
    for option in ("minutes", "tokens", "seeds", "documents"):
        value = getattr(args, option)
        words += [] if value is None else [f"--{option}", str(value)]
    return shlex.join([*words, *(["--sets", *args.sets] if args.sets else [])])


def planned(grid: Grid, root: Path | None, out: Path) -> list[Job]:
    """The runs of the grid, their documents ready."""
    with writing("--out", out):
        out.mkdir(parents=True, exist_ok=True)
        deepspeed_file(out)
    data = {name: documents.prepare(name, each, root, grid.documents, out / "data" / name)
            for name, each in grid.data.items()}
    children = Children()
    return [Job(each, out, data[each.data_name], children) for each in grid.runs()]


def execute(jobs: Sequence[Job], slots: int) -> list[Job]:
    """All of them, `slots` at a time. Returns those that failed."""
    cells = [job for job in jobs if job.run.seed == job.run.grid.seeds[0]]
    broken = side_by_side(cells, Job.measure_speed, slots, "measuring speeds")
    without_speed = {job.cell_folder for job in broken}
    unable = [job for job in jobs if job.cell_folder in without_speed]
    able = [job for job in jobs if job.cell_folder not in without_speed]
    return unable + side_by_side(able, Job.execute, slots, "training")


def side_by_side(jobs: Sequence[Job], work: Callable[[Job], None], slots: int, what: str) -> list[Job]:
    """Does the work of every job, and says in one line which failed and why. Returns those."""
    failed = []
    with ThreadPoolExecutor(slots) as pool, tqdm(
            total=len(jobs), desc=what, miniters=0, mininterval=1.0 if sys.stderr.isatty() else 30.0,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}]{postfix}") as bar:
        waiting: dict[Future, Job] = {pool.submit(work, job): job for job in jobs}
        try:
            while waiting:
                done, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    job = waiting.pop(future)
                    if (error := future.exception()) is not None:
                        failed.append(job)
                        tqdm.write(f"failed: {job.run}: {error}", file=sys.stderr)
                running = [job for future, job in waiting.items() if future.running()]
                bar.set_postfix_str("; ".join(str(job.run) for job in running), refresh=False)
                parts = sum(job.progress for job in running) if work is Job.execute else 0
                bar.update(len(jobs) - len(waiting) + _TRAINING * parts - bar.n)
        except KeyboardInterrupt:
            tqdm.write("interrupted: waiting for the runs to save; the same command goes on", file=sys.stderr)
            for future in waiting:
                future.cancel()
            jobs[0].children.end()
            raise
    return failed


if __name__ == "__main__":
    run(main)
