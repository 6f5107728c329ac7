"""One test cluster for all tests of this folder, or a loud skip where there can be none."""

import os
import shutil
import subprocess

import pytest

from tests.slurm.harness import Cluster

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "ip", "unshare")
INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge iproute2"


def why_not() -> str | None:
    """Why SLURM cannot run here."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed: {INSTALL}"
    trial = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "ip", "link", "add", "trial0",
                            "type", "bridge"], capture_output=True, text=True)
    return f"this user may not make namespaces: {trial.stderr.strip()}" if trial.returncode else None


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    reason = why_not()
    if reason is not None:
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(f"REQUIRE_SLURM is set, but {reason}")
        pytest.skip(f"no SLURM here: {reason}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()
