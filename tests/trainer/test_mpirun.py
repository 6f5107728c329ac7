"""`mpirun -n N python trainer/run.py ...` with OpenMPI."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.trainer.launching import ROOT, command_line, ds_config, lines, write_corpus

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    if shutil.which("mpirun") is None:
        reason = "mpirun is not installed: apt-get install --no-install-recommends openmpi-bin"
        if os.environ.get("REQUIRE_MPI"):
            pytest.fail(f"REQUIRE_MPI is set, but {reason}")
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("mpi")
    return folder, write_corpus(folder)


def start(workplace, name: str, port: int, **settings) -> subprocess.Popen:
    folder, data = workplace
    return subprocess.Popen(
        ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", "2", sys.executable, "trainer/run.py",
         *command_line(ds_config(folder), folder / name, {**data, **settings})],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port),
             "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"})


def test_two_ranks_train_to_the_end(workplace):
    process = start(workplace, "whole", 29701, **{"train.steps": 3})
    printed = process.communicate(timeout=180)[0]
    assert process.returncode == 0, printed
    assert lines(workplace[0] / "whole")[-1]["step"] == 3 and printed.count("finished: ") == 1


def test_a_mistake_has_its_exit_code_and_one_line(workplace):
    process = start(workplace, "mistake", 29702, **{"model.width": 33})
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 80, printed
    assert printed.count("error: model.attention.heads") == 1


def test_a_rank_that_dies_does_not_leave_the_job_hanging(workplace):
    process = start(workplace, "dies", 29703, **{"train.steps": 10000})
    run_dir = workplace[0] / "dies"
    while not (run_dir / "metrics.jsonl").exists() or (run_dir / "metrics.jsonl").read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    ranks = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline")
             if str(run_dir).encode() in _read(path) and b"mpirun" not in _read(path)]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - killed < 10


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""
