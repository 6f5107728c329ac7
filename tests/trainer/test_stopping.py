"""Requests to stop in every phase, and runs that a rank or the launcher leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.trainer.faults import AtBeat, SignalWhilePreparing
from tests.trainer.forked import free_port
from tests.trainer.launching import ROOT, command_line, ds_config, lines
from tests.trainer.workplace import SECONDS, STEPS, WORLD, Workplace
from trainer import checkpoint

INTERLUDES = {"eval_every": 5, "sample_every": 5}


@pytest.fixture(scope="module")
def place(launcher, tmp_path_factory):
    return Workplace(launcher, tmp_path_factory.mktemp("stopping"))


def status(place, name) -> dict:
    return json.loads((place.folder / name / "status.json").read_text())


@pytest.mark.parametrize("phase, number", [
    pytest.param(phase, number, marks=() if (phase, number) == ("evaluate", signal.SIGUSR1) else pytest.mark.slow)
    for phase in ("resume", "train", "evaluate", "sample", "save")
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)])
def test_a_signal_in_any_phase_saves_and_ends_with_0(place, phase, number):
    """To one rank only. What was being done is abandoned, all ranks save the same step, and the run can go on."""
    name = f"{phase} {number}"
    fault = AtBeat(rank=1, phase=phase, step=0 if phase == "resume" else 5, signal=number)
    codes, printed = place.run(name, fault, save_every=5, **INTERLUDES)
    assert codes == [0, 0], printed
    found = status(place, name)
    assert found["status"] == "preempted"
    if phase == "resume":
        assert found["step"] == 0 and not (place.folder / name / "checkpoints").exists()
    else:
        step = found["step"]
        assert step in (5, 6) and place.checkpoints(name)[-1] == step
        checkpoint.check(place.folder / name / "checkpoints" / f"step-{step:08d}")
    if phase in ("evaluate", "sample"):
        assert "step 5: evaluation abandoned" in printed
        assert len(lines(place.folder / name, "eval")) == (phase == "sample")
    codes, printed = place.run(name, save_every=5, **INTERLUDES)
    assert codes == [0, 0] and place.weights(name) == place.weights("whole")


@pytest.fixture(scope="module")
def evaluated(place):
    """The name of a finished run with evaluation and samples."""
    codes, printed = place.run("evaluated", **INTERLUDES)
    assert codes == [0, 0], printed
    return "evaluated"


@pytest.mark.parametrize("phase, left", [("train", {"eval": 0, "samples": 0}), ("evaluate", {"eval": 0, "samples": 0}),
                                         ("sample", {"eval": 1, "samples": 0})])
def test_the_last_steps_evaluation_is_not_lost(place, evaluated, phase, left):
    """A request in the last step leaves the run unfinished; the next start does what is missing, and no more."""
    name = f"last {phase}"
    codes, printed = place.run(name, AtBeat(rank=1, phase=phase, step=STEPS, signal=signal.SIGUSR1), **INTERLUDES)
    assert codes == [0, 0], printed
    assert (status(place, name)["status"], status(place, name)["step"]) == ("preempted", STEPS)
    assert place.checkpoints(name) == [STEPS] and not (place.folder / name / "model").exists()
    for kind, count in left.items():
        assert sum(line["step"] == STEPS for line in lines(place.folder / name, kind)) == count
    codes, printed = place.run(name, **INTERLUDES)
    assert codes == [0, 0] and status(place, name)["status"] == "done", printed
    assert place.weights(name) == place.weights(evaluated) == place.weights("whole")
    for kind in ("eval", "samples"):
        assert lines(place.folder / name, kind) == lines(place.folder / evaluated, kind)
    texts = Path("samples", f"step-{STEPS:08d}.jsonl")
    assert (place.folder / name / texts).read_text() == (place.folder / evaluated / texts).read_text()


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_while_data_is_prepared_ends_all_ranks(place, number):
    name = f"prepare {number}"
    codes, printed = place.run(name, SignalWhilePreparing(rank=1, signal=number))
    assert codes == [0, 0], printed
    assert printed.count("before the first step") == 1 and status(place, name)["status"] == "preempted"


def test_files_in_the_run_folder_save_and_stop(place):
    run_dir = place.folder / "files"
    codes, _ = place.run("files", AtBeat(rank=0, phase="train", step=3, file=run_dir / "save"))
    assert codes == [0, 0] and not (run_dir / "save").exists()
    assert place.checkpoints("files") == [3, 10] and status(place, "files")["status"] == "done"
    codes, _ = place.run("files", AtBeat(rank=0, phase="train", step=14, file=run_dir / "stop"), steps=30)
    assert codes == [0, 0] and not (run_dir / "stop").exists()
    assert status(place, "files") == {"status": "stopped", "step": 14, "reason": "the file stop"}
    assert place.checkpoints("files")[-1] == 14


def leave_alone(place, name, fault, **settings) -> tuple[list[int], str, float]:
    """Exit code of the first rank of a run whose other rank is left, what was printed, and how long it took to end
    after the other one was."""
    first, second = processes = place.start(name, fault, **settings)
    for process in processes:
        process.start()
    beat = place.folder / name / "heartbeats" / "rank00001.json"
    while second.exitcode is None and not _stopped(second.pid):
        assert first.exitcode is None, place.printed()
        time.sleep(0.05)
    began = time.monotonic()
    first.join(SECONDS)
    seconds = time.monotonic() - began
    for process in processes:
        process.kill()
        process.join()
    assert json.loads(beat.read_text())["rank"] == 1
    return first.exitcode, place.printed(), seconds


def _stopped(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_killed_rank_is_named(place):
    code, printed, seconds = leave_alone(place, "dead", AtBeat(rank=1, phase="train", signal=signal.SIGKILL))
    assert code == 91 and seconds < 60
    assert "error: lost another rank (rank 1 (host " in printed and "last seen in " in printed


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_frozen_rank_is_named(place, rank):
    """The first rank keeps the store through which ranks tell each other of failures; it may be the frozen one."""
    fault = AtBeat(rank=rank, phase="train", signal=signal.SIGSTOP)
    processes = place.start(f"frozen {rank}", fault, hang_minutes=0.1)
    for process in processes:
        process.start()
    other = processes[1 - rank]
    other.join(SECONDS)
    for process in processes:
        process.kill()
        process.join()
    printed = place.printed()
    assert other.exitcode == 90, printed
    assert "error: no progress for 0.1 minutes (train.hang_minutes)" in printed
    assert f"no sign of life from rank {rank} (host " in printed
    stacks = (place.folder / f"frozen {rank}" / "logs" / f"stacks-rank{1 - rank:05d}.txt").read_text()
    assert "_train_step" in stacks


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named(place):
    codes, printed = place.run("still", AtBeat(rank=1, phase="train", sleep=1000), hang_minutes=0.1)
    assert codes == [90, 90], printed
    assert "behind is rank 1 (host " in printed or "rank 1 is in train at step 5; other ranks wait" in printed


def processes_of(run_dir: Path) -> list[int]:
    """Numbers of all processes that have the folder on their command line, launchers included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run_dir).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has ended
    return found


@pytest.mark.slow
@pytest.mark.parametrize("program", ["deepspeed", "torchrun", "mpirun"])
def test_no_rank_outlives_its_launcher(place, program):
    script = [str(ROOT / "trainer" / "run.py")]
    port = str(free_port())
    launchers = {"deepspeed": ["--num_gpus", str(WORLD), "--master_port", port, *script],
                 "torchrun": ["--nproc_per_node", str(WORLD), "--master_port", port, *script],
                 "mpirun": ["--allow-run-as-root", "--oversubscribe", "-n", str(WORLD), sys.executable, *script]}
    path = Path(sys.executable).with_name(program)
    if program == "mpirun" and subprocess.run(["which", "mpirun"], capture_output=True).returncode:
        pytest.skip("mpirun is not installed")
    run_dir = place.folder / f"launched by {program}"
    command = [program if program == "mpirun" else str(path), *launchers[program],
               *command_line(ds_config(place.folder, micro=2), run_dir, {**place.corpus, "train.steps": 100_000,
                                                                         "train.save_every": 5})]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_PORT": port}
    with (place.folder / f"{program}.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + SECONDS
        while not list(run_dir.glob("checkpoints/step-*")):
            assert process.poll() is None and time.monotonic() < deadline, Path(output.name).read_text()
            time.sleep(0.1)
        process.terminate()
        deadline = time.monotonic() + 30
        while processes_of(run_dir) and time.monotonic() < deadline:
            process.poll()
            time.sleep(0.1)
        assert processes_of(run_dir) == [], Path(output.name).read_text()
    finally:
        for number in processes_of(run_dir):
            os.kill(number, signal.SIGKILL)
        process.wait()
    newest = max(run_dir.glob("checkpoints/step-*"))
    assert checkpoint.check(newest)["step"] > 0
