"""The job's script and the line of status, with stand-ins for SLURM and Python."""

import os
import shutil
import subprocess

import pytest

from tests.trainer.launching import ROOT

PROGRAMS = {"scontrol": "", "squeue": "", "python": "echo step 4/9"}


@pytest.fixture
def call(tmp_path):
    """Runs a line of bash in a copy of the scripts, with stand-ins before all other programs."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm", ignore=shutil.ignore_patterns("site.env"))
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)

    def run(line, **variables):
        env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PYTHON"))}
        env |= {"PATH": f"{programs}:{env['PATH']}", **variables}
        return subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    return run


def test_the_line_of_status_is_made_by_the_python_of_the_site(call, tmp_path):
    (tmp_path / "run" / "logs" / "7" / "restart-0").mkdir(parents=True)
    (tmp_path / ".cache" / "jobs").mkdir(parents=True)
    (tmp_path / ".cache" / "jobs" / "7").symlink_to(tmp_path / "run" / "logs" / "7" / "restart-0")
    site = tmp_path / "slurm" / "site.env"
    site.write_text(f"PYTHON={tmp_path}/programs/python\n")
    done = call("slurm/status.sh 7")
    assert done.returncode == 0 and done.stdout == "job 7 ended (restart-0) | step 4/9\n", done
    site.write_text("PYTHON=/nowhere/python\n")
    done = call("slurm/status.sh 7")
    assert done.returncode == 80 and done.stdout == ""
    assert done.stderr.startswith("error: PYTHON: there is no /nowhere/python") and done.stderr.count("\n") == 1
