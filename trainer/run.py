"""Entry point of training, under every launcher: `deepspeed trainer/run.py --ds_config … --preset …`."""

import sys
from pathlib import Path

# Launchers put this file's folder first on the path, where `trainer/config.py` would hide other modules.
_ROOT = str(Path(__file__).resolve().parents[1])
sys.path = [_ROOT, *(entry for entry in sys.path if Path(entry or ".").resolve() != Path(_ROOT, "trainer"))]

import importlib.util  # noqa: E402
import os  # noqa: E402
import traceback  # noqa: E402

if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    # Segments that grow keep row lengths that vary from fragmenting a GPU's memory. PyTorch reads it once.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

from trainer.errors import ExitCode, LostRankError, exit_code_of, line_of  # noqa: E402

if importlib.util.find_spec("torch") is None:
    print(f"error: {sys.executable} has no torch: activate the environment that `make setup` makes "
          "(. .venv/bin/activate)", file=sys.stderr)
    sys.exit(ExitCode.CONFIG)

from model.allocator import keep_freed_memory  # noqa: E402
from trainer import failure, launch  # noqa: E402
from trainer.command_line import parse  # noqa: E402
from trainer.topology import check_topology  # noqa: E402


def main() -> None:
    """Resolves the configuration, joins the ranks, trains; ends the process with a documented exit code."""
    try:
        launch.map_environment()
        args, run, ds = parse()
        check_topology(run, ds, world=int(os.environ["WORLD_SIZE"]))
        if args.dry_run:
            from trainer.dry_run import describe_run
            print(describe_run(run, ds, world=int(os.environ["WORLD_SIZE"])))
            return
        train(args, run, ds)
    except Exception as error:
        leave(error)


def train(args, run, ds) -> None:
    """Everything after the command line."""
    from trainer.hardware import flush_denormals
    from trainer.kernels import DTYPES, chosen_kernels
    from trainer.loop import TrainingRun
    from trainer.parents import watch_launchers
    from trainer.run_folder import RunFolder, on_first_rank
    from trainer.signals import StopRequest, StopRequested
    from trainer.watchdog import Watchdog

    stop = StopRequest(run.train.max_minutes)
    stop.install()
    watch_launchers(stop)
    keep_freed_memory()
    flush_denormals()
    ranks = launch.start(launch.time_limit(run.train.hang_minutes))

    def say(text: str) -> None:
        if ranks.first:
            print(text, flush=True)

    ds.check_device(ranks.device.type)
    run.check_device(ranks.device.type)
    for notice in ds.notices_on(ranks.device.type):
        say(f"{ds.path}: {notice}")
    kernels = chosen_kernels(run.model, ranks.device, DTYPES[ds.precision])
    for part, choice in kernels.items():
        say(f"{part}: {choice}")
    folder = RunFolder(args.run_dir, args.resume, args.init_from)
    on_first_rank(ranks, lambda: folder.open(run, ds, {"command": sys.argv, "kernels": kernels}, say))
    watchdog = Watchdog(folder.path, ranks.rank, ranks.world, run.train.hang_minutes)
    try:
        with folder.kept():
            finished = TrainingRun(run, ds, folder, ranks, stop, watchdog).train()
    except StopRequested:  # while preparing data: the other ranks are told as they are of a failure
        folder.mark("preempted", folder.newest_step(), stop.reason)
        first, code = failure.report(ExitCode.FINISHED)
        if first:
            print(f"stopped on request ({stop.reason}) before the first step: {folder.path}", flush=True)
        failure.leave(code)
    except Exception as error:
        missing = watchdog.missing() if exit_code_of(error) == ExitCode.COMMUNICATION else ""
        if missing:
            raise LostRankError(missing) from error
        raise
    stop.dismiss()
    say(f"{'finished' if finished else f'stopped on request ({stop.reason}) and saved; run again to continue'}: "
        f"{folder.path}")
    launch.stop()


def leave(error: Exception) -> None:
    """Says once, in one line, what went wrong, and ends this process at once: others may be waiting in a collective,
    and their launcher ends them when it sees the exit code."""
    first, code = failure.report(exit_code_of(error))
    if first or isinstance(error, launch.NoGPUError):
        if code == ExitCode.UNEXPECTED:
            traceback.print_exception(error)
        print(f"error: {line_of(error)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    failure.leave(code)


if __name__ == "__main__":
    main()
