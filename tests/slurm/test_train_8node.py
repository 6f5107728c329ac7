"""`sbatch slurm/train_8node.sh` on a real SLURM: eight nodes and a spare, the real trainer, one rank a node."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.harness import weights
from tests.trainer.launching import ROOT, command_line, ds_config, lines, write_corpus

pytestmark = pytest.mark.slow
LOSSES = ("loss", "cross_entropy", "balance", "router_z", "gradient_norm")
STEPS = 24


@pytest.fixture(scope="module")
def workplace(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    settings = {**write_corpus(cluster.data), "train.steps": STEPS, "train.save_every": 5, "train.keep_last": 0,
                "train.expert_parallel_size": 4}
    return folder, ds_config(folder), settings


@pytest.fixture(scope="module")
def whole(cluster, workplace):
    """A job that nothing happens to, with all checks."""
    folder, ds, settings = workplace
    job = cluster.submit(folder / "whole", ds, settings, PREFLIGHT="full")
    job.completed()
    return job


def test_job_trains_to_the_end_and_tidies_up(cluster, whole):
    assert whole.facts["Restarts"] == "0" and len(whole.logs) == 1
    assert all(len(list((whole.logs[0] / "preflight").glob(f"{probe}-*.log"))) == 8 for probe in ("nodes", "ranks"))
    status = whole.status()
    assert f"job {whole.number} COMPLETED (restart-0) | step {STEPS}/{STEPS} | loss " in status
    assert f"tokens/s | last checkpoint step {STEPS}" in status and "failed" not in status
    assert f"finished: step {STEPS}/{STEPS}" in whole.printed
    for rank in range(8):
        assert whole.log(rank=rank).startswith(f"rank {rank} of 8 on node{rank + 1}\n")
    assert not list(Path("/tmp").glob(f"caches-{whole.number}-*"))


def test_before_the_limit_it_saves_and_continues_in_the_queue(cluster, whole, workplace):
    """USR1 to the job's script is what SLURM sends ahead of the time limit."""
    folder, ds, settings = workplace
    job = cluster.submit(folder / "limit", ds, settings)
    job.wait_for_step(random.randint(2, STEPS // 2))
    cluster.do("exec", "scancel", "--batch", "--signal=USR1", job.number)
    job.completed()
    assert job.facts["Restarts"] == "1" and "the ranks are asked to save" in job.printed
    assert "resumed from" in job.log()
    assert weights(job.run_dir) == weights(whole.run_dir)


def test_node_set_down_and_newest_checkpoint_damaged(cluster, whole, workplace):
    folder, ds, settings = workplace
    job = cluster.submit(folder / "down", ds, settings)
    job.wait_for_step(11)
    cluster.do("exec", "scontrol", "update", "nodename=node4", "state=DOWN", "reason=test")
    job.wait(lambda: job.state == "PENDING", 60, "queued again")
    newest = max((job.run_dir / "checkpoints").glob("step-*"))
    victim = next((newest / "engine").glob("*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-1])
    job.completed()
    assert job.facts["Restarts"] == "1"
    assert "passing over a damaged checkpoint" in job.log() and victim.name in job.log()
    assert weights(job.run_dir) == weights(whole.run_dir)
    cluster.wait_for_nodes()  # it answers, and is taken back


@pytest.fixture
def broken(cluster, request):
    """Breaks one node as the parameter says, and mends it afterwards."""
    breaking, mending = request.param
    breaking(cluster)
    yield
    mending(cluster)


def _hide_data(cluster):
    cluster.do("node", 3, "mount", "-t", "tmpfs", "none", cluster.data)


def _hide_leader(cluster):
    cluster.do("node", 5, "bash", "-c", f"grep -v -w node1 /etc/hosts >{cluster.folder}/hosts5 && "
               f"mount --bind {cluster.folder}/hosts5 /etc/hosts")


BROKEN = {
    "node2: 7 of 8 GPUs": (lambda c: c.do("gpus", 2, 7), lambda c: c.do("gpus", 2, 8)),
    "node3: data.train: ": (_hide_data, lambda c: c.do("node", 3, "umount", c.data)),
    "node5: cannot resolve node1": (_hide_leader, lambda c: c.do("node", 5, "umount", "/etc/hosts")),
}


@pytest.mark.parametrize("broken, named", [(pair, name) for name, pair in BROKEN.items()], indirect=["broken"],
                         ids=["GPU", "data", "name"])
def test_bad_node_is_named_and_the_spare_takes_its_place(cluster, workplace, broken, named):
    folder, ds, settings = workplace
    node = named.partition(":")[0]
    job = cluster.submit(folder / f"without-{node}", ds, {**settings, "train.steps": 2})
    job.completed()
    assert f"bad node {named}" in job.printed
    assert job.facts["ExcNodeList"] == node and job.facts["Restarts"] == "1"
    assert lines(job.run_dir)[-1]["step"] == 2
    assert len(job.logs) == 2 and not list(job.logs[0].glob("rank-*.log")) and list(job.logs[1].glob("rank-*.log"))


def test_rank_that_dies_ends_the_job(cluster, workplace):
    folder, ds, settings = workplace
    job = cluster.submit(folder / "dies", ds, {**settings, "train.steps": 10000})
    job.wait_for_step(6)
    cluster.do("node", 5, "pkill", "-KILL", "-f", "trainer/run.py")
    killed = time.monotonic()
    assert job.end(30) == "FAILED" and time.monotonic() - killed < 10
    assert job.facts["Restarts"] == "0"
    assert "rank 4 on node5 failed first: Killed" in job.status()
    assert "FAILED: step " in job.printed and "last checkpoint step 5" in job.printed


def test_mistake_in_the_configuration_ends_the_job_at_once(cluster, workplace):
    folder, ds, settings = workplace
    job = cluster.submit(folder / "mistake", ds, {**settings, "model.width": 33})
    assert job.end(30) == "FAILED"
    assert job.facts["ExitCode"] == "80:0" and job.facts["Restarts"] == "0"
    assert "error: model.attention.heads: 2 heads do not divide model.width = 33" in job.printed


@pytest.fixture(scope="module")
def powered_off(cluster, workplace):
    """A job that has just lost a node. SLURM notices after half a minute, and gives the dead node another minute to end
    its part of the job: time for a test that needs no job."""
    folder, ds, settings = workplace
    job = cluster.submit(folder / "off", ds, settings)
    job.wait_for_step(7)
    cluster.do("off", 6)
    yield job
    cluster.do("on", 6)


def test_losses_equal_those_of_deepspeed_on_one_machine(whole, workplace, powered_off):
    folder, ds, settings = workplace
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "8", "--master_port", "29611",
               "trainer/run.py", *command_line(ds, folder / "deepspeed", settings)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
                               start_new_session=True)
    try:
        printed = process.communicate(timeout=400)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, printed
    expected, found = lines(folder / "deepspeed"), lines(whole.run_dir)
    assert len(expected) == len(found) == STEPS
    for one, other in zip(expected, found, strict=True):
        for name in LOSSES:
            assert other[name] == pytest.approx(one[name], rel=1e-5), (one["step"], name)


def test_node_powered_off(whole, powered_off):
    job = powered_off
    job.wait(lambda: job.facts["Restarts"] == "1", 240, "queued again")
    job.completed()
    assert "ranks on node[1-5,7-9]" in job.printed
    assert "checkpoints/step-00000005" in job.log()
    assert weights(job.run_dir) == weights(whole.run_dir)
