"""How a job comes back, or does not: preemption, chains, caps, missing spares. Two nodes each, the real trainer."""

import re
import sys
from pathlib import Path

import pytest

from tests.slurm.harness import Job
from tests.trainer.launching import ds_config, lines, write_corpus

pytestmark = pytest.mark.slow
STEPS = 16
TWO = ("--nodes=2",)


@pytest.fixture(scope="module")
def workplace(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("queue")
    settings = {**write_corpus(folder), "train.steps": STEPS, "train.save_every": 5}
    return folder, ds_config(folder), settings


@pytest.mark.parametrize("script", ["train_8node.sh", "train_1node.sh"])
def test_slurm_accepts_the_scripts_as_they_are(cluster, script):
    assert "to start at" in cluster.do("exec", "sbatch", "--test-only", f"slurm/{script}", check=False)


def test_ranks_of_one_node_share_its_gpus(cluster, workplace):
    folder, ds, settings = workplace
    job = cluster.submit(folder / "one_node", ds, settings, sbatch=("--ntasks-per-node=2", "--gpus-per-node=2"),
                         script="train_1node.sh", PREFLIGHT="full")
    job.completed()
    assert [job.log(rank=rank).splitlines()[0] for rank in (0, 1)] == [f"rank {r} of 2 on node1" for r in (0, 1)]
    assert lines(job.run_dir)[-1]["step"] == STEPS


def test_preempted_job_saves_and_comes_back(cluster, workplace):
    folder, ds, settings = workplace
    # Steps enough to be still at work when SLURM has come to preempt it.
    job = cluster.submit(folder / "preempted", ds, {**settings, "train.steps": 200}, sbatch=TWO)
    job.wait_for_step(4)
    cluster.do("exec", "sbatch", "--partition=high", "--nodes=9", "--exclusive", f"--output={folder}/high.out",
               "--wrap=sleep 1")
    job.completed()
    assert job.facts["Restarts"] == "1" and "the ranks are asked to save" in job.printed
    saved = int(re.search(r"saved: step (\d+)", job.printed)[1])
    assert f"checkpoints/step-{saved:08d}" in job.log()


def _links(job: Job) -> dict[str, str]:
    """State of each link of a chain."""
    shown = job.cluster.do("exec", "scontrol", "-o", "show", "job", job.number)
    return dict(re.findall(r"ArrayTaskId=(\S+) .*? JobState=(\S+)", shown))


def test_chain_continues_in_its_next_link_and_ends_with_the_run(cluster, workplace):
    folder, ds, settings = workplace
    job = cluster.submit(folder / "chain", ds, settings, sbatch=(*TWO, "--array=1-4%1", "--no-requeue"))
    job.wait(lambda: job.steps() >= 4, 120, "step 4")
    # SLURM 22.05 signals the link, and then complains of those that do not run yet.
    cluster.do("exec", "scancel", "--batch", "--signal=USR1", f"{job.number}_1", check=False)
    job.wait(lambda: _links(job).get("2") in ("COMPLETED", "FAILED"), 120, "end of the second link")
    states = _links(job)
    assert states.pop("1") == states.pop("2") == "COMPLETED" and set(states.values()) == {"CANCELLED"}
    assert [path.name for path in job.logs] == ["link-1-restart-0", "link-2-restart-0"]
    assert "resumed from" in job.log() and lines(job.run_dir)[-1]["step"] == STEPS
    assert f"step {STEPS}/{STEPS}" in job.status()


def test_chain_of_jobs_that_would_run_at_once_is_refused(cluster, workplace):
    folder, ds, settings = workplace
    job = cluster.submit(folder / "crowd", ds, settings, sbatch=(*TWO, "--array=1-2"))
    job.wait(lambda: "FAILED" in _links(job).values(), 30, "refusal")
    assert "--array=1-10%1" in job.printed and not job.run_dir.exists()


def test_where_requeueing_is_forbidden_the_job_says_so(cluster, workplace):
    folder, ds, settings = workplace
    job = cluster.submit(folder / "forbidden", ds, settings, sbatch=(*TWO, "--no-requeue"))
    job.wait_for_step(3)
    cluster.do("exec", "scancel", "--batch", "--signal=USR1", job.number)
    assert job.end() == "FAILED" and job.facts["ExitCode"] == "75:0"
    assert "saved: step" in job.printed and "submit it again, or as a chain" in job.printed


def test_interrupted_by_its_user_it_saves_and_stays_away(cluster, workplace):
    folder, ds, settings = workplace
    job = cluster.submit(folder / "interrupted", ds, settings, sbatch=TWO)
    job.wait_for_step(3)
    cluster.do("exec", "scancel", "--signal=INT", job.number)
    job.completed()
    assert job.facts["Restarts"] == "0" and "saved and stopped as asked: step" in job.printed


def test_failures_are_tried_again_where_that_is_wanted(cluster, workplace):
    folder, ds, settings = workplace
    job = cluster.submit(folder / "retried", ds, {**settings, "train.steps": 100}, sbatch=TWO, RETRY_FAILURES="yes")
    job.wait_for_step(7)
    cluster.do("node", 2, "pkill", "-KILL", "-f", "trainer/run.py")
    job.completed()
    assert "rank 1 on node2 failed first: Killed" in job.printed
    assert job.facts["Restarts"] == "1" and "resumed from" in job.log()


def test_a_setting_that_does_not_exist_is_refused(cluster, workplace):
    folder, ds, settings = workplace
    job = cluster.submit(folder / "setting", ds, settings, sbatch=TWO, PREFLIGHT="some")
    assert job.end(30) == "FAILED" and job.facts["ExitCode"] == "80:0"
    assert "PREFLIGHT is 'some', must be full or nodes" in job.printed


def test_starts_that_add_nothing_come_to_an_end(cluster, workplace):
    folder, ds, settings = workplace
    job = cluster.submit(folder / "idle", ds, settings, sbatch=(*TWO, "--hold"), MAX_IDLE_STARTS="2")
    starts = job.run_dir / "logs" / job.number / "starts"
    starts.parent.mkdir(parents=True)
    starts.write_text("0\n0\n")
    cluster.do("exec", "scontrol", "release", job.number)
    assert job.end(60) == "FAILED" and "2 starts in a row have added no checkpoint to step 0" in job.printed


def test_node_that_does_not_answer_is_replaced(cluster, workplace):
    """Here: one that lacks the Python of the others."""
    folder, ds, settings = workplace
    cluster.wait_for_nodes()
    python = Path(sys.executable).parent
    cluster.do("node", 2, "mount", "-t", "tmpfs", "none", python)
    try:
        job = cluster.submit(folder / "silent", ds, {**settings, "train.steps": 2}, sbatch=TWO,
                             PREFLIGHT_SECONDS="8")
        job.completed()
    finally:
        cluster.do("node", 2, "umount", python)
    assert "bad node node2: did not answer" in job.printed and job.facts["ExcNodeList"] == "node2"


def test_without_a_spare_the_job_names_the_bad_node_and_ends(cluster, workplace):
    folder, ds, settings = workplace
    cluster.do("gpus", 7, 6)
    try:
        job = cluster.submit(folder / "no_spare", ds, settings, sbatch=("--exclude=node9",))
        assert job.end(60) == "FAILED" and job.facts["ExitCode"] == "92:0"
    finally:
        cluster.do("gpus", 7, 8)
    assert "bad node node7: 6 of 8 GPUs" in job.printed and "no 8 nodes without node7" in job.printed


def test_missing_data_is_nobodys_node(cluster, workplace):
    folder, ds, settings = workplace
    job = cluster.submit(folder / "no_data", ds, {**settings, "data.train": "nowhere.jsonl"}, sbatch=TWO)
    assert job.end(60) == "FAILED" and job.facts["ExitCode"] == "81:0" and job.facts["Restarts"] == "0"
    assert "data.train: nowhere.jsonl" in job.printed
