"""Every mistake in `mistakes.py` ends all ranks at once, with one line and its exit code."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mistakes.mistakes import ALL_RANKS, DS_CONFIG, MISTAKES, Mistake, page
from tests.trainer.launching import ROOT, write_corpus
from trainer.errors import ExitCode

SECONDS = 15
"""No start of these small runs takes longer; a rank that does, hangs."""


def run_rank(command: list[str], folder: Path, rank: int, world: int, port: int) -> None:
    """One rank of trainer/run.py, in a process of its own that has the program's modules loaded already."""
    os.chdir(folder)
    output = os.open(folder / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["trainer/run.py", *command]
    from trainer import run, run_folder
    run_folder._LOCK_SECONDS = 1  # to wait for a folder in use
    run.main()


@pytest.fixture(scope="module")
def launcher():
    """Starts processes in a fraction of the time that a fresh interpreter takes to import PyTorch and DeepSpeed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("forkserver")
        # DeepSpeed loads PyTorch's compiler for Muon, whatever optimizer it is given.
        context.set_forkserver_preload(["trainer.loop", "datasets", "deepspeed.runtime.zero.muon.muon_optimizer",
                                        __name__])
        yield context


@pytest.fixture(scope="module")
def workplaces(tmp_path_factory, launcher):
    """Folders with everything that a run needs, and a finished run: by the number of ranks of that run."""
    folders = {}
    for world in ALL_RANKS:
        folders[world] = folder = tmp_path_factory.mktemp(f"mistakes{world}")
        write_corpus(folder)
        (folder / "ds.json").write_text(json.dumps(DS_CONFIG))
        codes, outputs = launch(launcher, folder, Mistake("", "", ""), world, free_port())
        assert codes == [0] * world, outputs
    return folders


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(launcher, folder: Path, mistake: Mistake, world: int, port: int) -> tuple[list[int], list[str]]:
    """(exit codes, outputs) of all ranks; None is the exit code of a rank that did not end."""
    ranks = [launcher.Process(target=run_rank, args=(mistake.command(), folder, rank, world, port))
             for rank in range(world)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + SECONDS
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes, [(folder / f"rank{rank}.txt").read_text() for rank in range(world)]


@contextlib.contextmanager
def small_disk(place: Path, kilobytes: int):
    """A file system of its own, which only an administrator can make."""
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(place)],
                          capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a full disk needs a small file system, which cannot be mounted here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def make_mistake(mistake: Mistake, folder: Path) -> None:
    if not mistake.resumes:
        shutil.rmtree(folder / "run")
    (folder / "ds.json").write_text(json.dumps(DS_CONFIG | mistake.ds))
    for name, content in mistake.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, target in mistake.links.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)


def trials() -> Iterator:
    for mistake in MISTAKES:
        for world in ALL_RANKS:
            # Where the port is taken, a second rank would only wait for its launcher to end it.
            if world != mistake.saved_by and not (mistake.port_taken and world > 1):
                name = f"{mistake.stage}: {mistake.what}, {world} rank{'s' * (world > 1)}"
                yield pytest.param(mistake, world, id=name, marks=() if world in mistake.ranks else pytest.mark.slow)


@pytest.mark.parametrize("mistake, world", list(trials()))
def test_mistake_gets_one_line_and_its_exit_code(workplaces, launcher, tmp_path, mistake, world):
    folder = tmp_path / "work"
    shutil.copytree(workplaces[mistake.saved_by or world], folder)
    make_mistake(mistake, folder)
    with contextlib.ExitStack() as stack:
        if mistake.disk:
            stack.enter_context(small_disk(folder / mistake.disk, mistake.disk_kb))
        if mistake.held:
            fcntl.flock(stack.enter_context((folder / "run" / ".lock").open("w")), fcntl.LOCK_EX)
        port = free_port()
        if mistake.port_taken:
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        codes, outputs = launch(launcher, folder, mistake, world, port)
    printed = "\n".join(outputs)
    assert codes == [mistake.code] * world, printed
    assert "Traceback" not in printed
    lines = printed.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    wanted = ".*".join(map(re.escape, mistake.says.split("…")))
    if mistake.code:
        assert len(errors) == 1 and re.fullmatch("error: " + wanted, errors[0]), printed
    else:
        assert not errors and sum(bool(re.fullmatch(wanted, line)) for line in lines) == 1, printed


@pytest.mark.slow
def test_launcher_passes_the_exit_code_on(workplaces):
    workplace = workplaces[2]
    (workplace / "broken.jsonl").write_text("broken\n")
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    mistake = Mistake("", "", "", set=("data.train=broken.jsonl",), arguments=("--run_dir", "launched"))
    result = subprocess.run([*launcher, str(ROOT / "trainer" / "run.py"), *mistake.command()], cwd=workplace, text=True,
                            capture_output=True, timeout=120)
    assert result.returncode == ExitCode.DATA, result.stdout + result.stderr
    assert result.stderr.count("error: broken.jsonl:1: is not valid JSON") == 1
    assert "Traceback" not in result.stdout + result.stderr


def test_documentation_is_up_to_date():
    assert (ROOT / "docs" / "errors.md").read_text() == page(), "run python tests/mistakes/mistakes.py > docs/errors.md"
