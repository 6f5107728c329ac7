"""The job's script and the line of status, with stand-ins for SLURM and Python."""

import os
import shutil
import subprocess

import pytest

from tests.trainer.launching import ROOT

SCONTROL = """
case "$*" in
    "show hostnames"*) echo localhost ;;
    "-o show job"*) echo "JobId=7 PreemptTime=$PREEMPTED RunTime=00:00:05 TimeLimit=$LIMIT ExcNodeList=(null)" ;;
    requeue*) echo "queued again" ;;
esac
"""
PROGRAMS = {
    "scontrol": SCONTROL, "srun": "", "squeue": "", "sleep": "",
    # Asked before training for its step, for one: SLURM's signal then comes as early as the first checks.
    "python": 'case "$*" in *checkpoint*) [ -z "$JOB_PID" ] || kill -USR1 "$JOB_PID" ;; esac; echo "step 4/9"',
}


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
        env |= {"PATH": f"{programs}:{env['PATH']}", "JOB_PID": "", **variables}
        return subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    return run


@pytest.mark.parametrize("limit, preempted, code, said", [
    ("00:10:00", "None", 80, "of a limit of 00:10:00: give sbatch a longer --time, or --signal=B:USR1@60"),
    ("00:10:00", "2026-01-01T00:00:00", 75, "queued again"),
    ("01:00:00", "None", 75, "queued again"),
    ("1-00:05:00", "None", 75, "queued again"),
])
def test_a_limit_no_longer_than_the_time_to_save_is_refused(call, limit, preempted, code, said):
    slurm = {"JOB_ID": "7", "JOB_NAME": "train", "JOB_NUM_NODES": "1", "JOB_NODELIST": "localhost", "NTASKS": "1",
             "JOB_PARTITION": "main"}
    done = call("export JOB_PID=$$; . slurm/lib/job.sh", LIMIT=limit, PREEMPTED=preempted, PREFLIGHT="nodes",
                PYTHON="python", **{f"SLURM_{name}": value for name, value in slurm.items()})
    assert done.returncode == code and said in done.stdout.splitlines()[-1], done
    assert ("queued again" in done.stdout) == (code == 75)


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
