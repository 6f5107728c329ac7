"""Every mistake in `mistakes.py` ends all ranks at once, with one line and its exit code."""

import contextlib
import fcntl
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mistakes.mistakes import ALL_RANKS, DS_CONFIG, MISTAKES, Mistake, page
from tests.trainer.forked import free_port, launch
from tests.trainer.launching import ROOT, write_corpus
from trainer.errors import ExitCode

SECONDS = 60
"""No start of these small runs takes longer; a rank that does, hangs."""


@pytest.fixture(scope="module")
def workplaces(tmp_path_factory, launcher):
    """Folders with everything that a run needs, and a finished run: by the number of ranks of that run."""
    folders = {}
    for world in ALL_RANKS:
        folders[world] = folder = tmp_path_factory.mktemp(f"mistakes{world}")
        write_corpus(folder)
        (folder / "ds.json").write_text(json.dumps(DS_CONFIG))
        codes, outputs = launch(launcher, folder, Mistake("", "", "").command(), world, SECONDS)
        assert codes == [0] * world, outputs
    return folders


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
        codes, outputs = launch(launcher, folder, mistake.command(), world, SECONDS, port=port)
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
