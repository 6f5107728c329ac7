"""What the job's script decides from: verdicts on nodes, the first failure, the line of status."""

import json
import threading
from dataclasses import asdict

import pytest
import torch

from tools.cluster import node_probe
from tools.cluster.judge import STAGES, judge_nodes, judge_ranks
from tools.cluster.node_probe import Mesh
from tools.cluster.progress import ending, first_failure, status
from tools.cluster.rank_probe import working_device
from trainer.data.config import DataConfig
from trainer.errors import ExitCode

NODES = ["a", "b", "c", "d"]
PLAN = {"nodes": NODES, "ranks": 8}


def report(node: str, **changes) -> dict:
    others = {name: 0.01 for name in NODES if name != node}
    return {"node": node, "problems": [], "facts": {"torch": "2.13.0", "python": "3.11.7"}, "unreached": {},
            "unheard": [], "clock_offset": others, **changes}


def verdict(*changed: dict) -> dict[str, str]:
    reports = {node: report(node) for node in NODES} | {each["node"]: each for each in changed}
    found = judge_nodes(PLAN, [each for each in reports.values() if "silent" not in each])
    return {node: "; ".join(text for _, text in problems) for node, problems in found.items()}


def test_good_nodes_are_left_alone():
    assert verdict() == {}


def test_a_nodes_own_problems_are_named():
    assert verdict(report("b", problems=[["GPU", "7 of 8 GPUs"]])) == {"b": "7 of 8 GPUs"}
    assert "did not answer" in verdict({"node": "c", "silent": True})["c"]


def test_the_minority_has_the_wrong_version():
    found = verdict(report("c", facts={"torch": "2.12.1"}))
    assert found == {"c": "python is none, on the other nodes 3.11.7; torch is 2.12.1, on the other nodes 2.13.0"}


def test_a_wrong_clock_is_told_from_those_who_see_it():
    offsets = {node: report(node, clock_offset={**report(node)["clock_offset"], "b": 40.0}) for node in "acd"}
    assert verdict(*offsets.values(), report("b", clock_offset=dict.fromkeys("acd", -40.0))) == {
        "b": "its clock is 40 s ahead"}


def test_failing_ways_belong_to_the_node_that_most_of_them_share():
    lonely = report("d", unreached=dict.fromkeys("abc", "timed out"), unheard=["a", "b", "c"])
    others = [report(node, unreached={"d": "no route"}, unheard=["d"]) for node in "abc"]
    found = verdict(*others, lonely)
    assert found.keys() == {"d"} and "6 of its ways to other nodes fail" in found["d"]


def test_a_node_with_another_problem_explains_failing_ways():
    deaf = report("b", problems=[["name resolution", "cannot resolve a"]], unreached={"a": "cannot resolve it"})
    found = verdict(deaf, report("a", unheard=["b"]))
    assert found == {"b": "cannot resolve a"}


def passed(node: str, rank: int, stages: int) -> list[dict]:
    return [{"node": node, "rank": rank, "passed": stage, "seconds": 0.1} for stage in STAGES[:stages]]


def test_the_node_whose_rank_falls_behind_is_bad():
    good = [line for rank in range(8) if rank != 5 for line in passed(NODES[rank // 2], rank, 3)]
    assert judge_ranks(PLAN, [line for rank in range(8) for line in passed(NODES[rank // 2], rank, 5)]) == {}
    broken = [*good, {"node": "c", "rank": 5, "failed": "device", "error": "no GPU"}]
    assert judge_ranks(PLAN, broken) == {"c": [("collectives", "does not come through device (rank 5: no GPU)")]}
    stuck = [*good, *passed("c", 5, 3)]  # all ranks in the same collective: no node alone is to blame
    assert judge_ranks(PLAN, stuck).keys() == set(NODES)


def test_ranks_are_probed_on_the_cpu_where_they_will_train_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert working_device(3, gpus=8) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR")
    with pytest.raises(RuntimeError, match="PyTorch finds no GPU"):
        working_device(3, gpus=8)


@pytest.fixture
def node(tmp_path, monkeypatch):
    """(plan, program): a node on which all is well, with two GPUs that the program `nvidia-smi` shows."""
    for path in ("run/logs", "bin"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "train.jsonl").write_text('{"src": "a", "trg": "b"}\n')
    program = tmp_path / "bin" / "nvidia-smi"
    show_gpus(program, "0, H100, 570.00, 0, 4", "1, H100, 570.00, [N/A], 4")
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setattr(node_probe, "_SHARED_MEMORY_BYTES", 0)
    data = asdict(DataConfig(train=str(tmp_path / "train.jsonl"), valid=""))
    return {"run_dir": str(tmp_path / "run"), "data": data, "gpus": 2, "nodes": ["localhost"], "disk_bytes": 1}, program


def show_gpus(program, *lines: str) -> None:
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)


def texts(plan: dict) -> list[str]:
    return [text for _, text in node_probe.problems(plan, "a")]


def test_a_good_node_has_no_problems(node):
    assert texts(node[0]) == [] and node_probe.facts()["GPUs"] == "H100, driver 570.00"


def test_problems_of_gpus(node):
    plan, program = node
    show_gpus(program, "0, H100, 570.00, 3, 40000")
    assert texts(plan) == ["1 of 2 GPUs", "GPU 0 has 3 uncorrected memory errors",
                           "40000 MiB of GPU 0 are in use by another process"]
    program.unlink()
    assert texts(plan) == ["0 of 2 GPUs"]


def test_problems_of_files_and_names(node, monkeypatch):
    plan, _ = node
    assert "two checkpoints take" in texts({**plan, "disk_bytes": 1e18})[0]
    assert "must be on a shared disk" in texts({**plan, "run_dir": "/nowhere"})[0]
    assert texts({**plan, "data": {**plan["data"], "train": "/nowhere.jsonl"}}) == [
        "data.train: /nowhere.jsonl: no such file or folder"]
    assert texts({**plan, "nodes": ["no-such-node.invalid"]})[0].startswith("cannot resolve no-such-node.invalid")
    monkeypatch.setattr(node_probe, "_SHARED_MEMORY_BYTES", 1e18)
    assert texts(plan)[0].startswith("/dev/shm has only")


def test_nodes_greet_each_other_within_bounds():
    """Two nodes on this machine's loopback addresses, and a third that is not there."""
    addresses = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    nodes = {name: Mesh(name, [other for other in addresses if other != name], 19731, 1.5, address=name)
             for name in addresses[:2]}
    threads = [threading.Thread(target=mesh.meet) for mesh in nodes.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    for name, mesh in nodes.items():
        (other,) = nodes.keys() - {name}
        assert mesh.greeted_by == {other} and mesh.unreached.keys() == {"127.0.0.3"}
        assert abs(mesh.clock_offset[other]) < 1


@pytest.fixture
def attempt(tmp_path):
    """(run folder, logs) of an attempt with four ranks."""
    logs = tmp_path / "logs" / "7" / "restart-0"
    logs.mkdir(parents=True)
    for rank in range(4):
        (logs / f"rank-{rank:03d}.log").write_text(f"rank {rank} of 4 on node{rank + 1}\nready\n")
    return tmp_path, logs


def say(logs, rank: int, text: str) -> None:
    with (logs / f"rank-{rank:03d}.log").open("a") as file:
        file.write(text + "\n")


def test_first_failure_is_the_rank_that_speaks(attempt):
    _, logs = attempt
    say(logs, 2, "error: data/x.jsonl:3: is not valid JSON")
    (logs / "srun.log").write_text("srun: error: node[1-4]: tasks 0-3: Exited with exit code 81\n")
    assert first_failure(logs) == (2, "node3", "data/x.jsonl:3: is not valid JSON", ExitCode.DATA)


def test_first_failure_is_the_killed_rank_and_not_those_who_lost_it(attempt):
    _, logs = attempt
    say(logs, 1, "error: lost another rank (connection reset)")
    (logs / "srun.log").write_text("srun: error: node2: task 1: Exited with exit code 91\n"
                                   "srun: launch/slurm: _step_signal: Terminating StepId=7.1\n"
                                   "srun: error: node4: task 3: Segmentation fault (core dumped)\n")
    assert first_failure(logs) == (3, "node4", "Segmentation fault (core dumped)", 139)


def test_first_failure_of_a_rank_that_could_not_even_start(attempt):
    _, logs = attempt
    say(logs, 0, "ModuleNotFoundError: No module named 'torch'")
    (logs / "srun.log").write_text("srun: error: node1: task 0: Exited with exit code 1\n")
    assert first_failure(logs).text == "Exited with exit code 1: ModuleNotFoundError: No module named 'torch'"


def test_ending(attempt):
    run_dir, logs = attempt
    marker = run_dir / "status.json"
    assert ending(run_dir, logs, 0, False) == ("failed", ExitCode.UNEXPECTED)  # never success without the marker
    marker.write_text(json.dumps({"status": "done"}))
    assert ending(run_dir, logs, 0, False) == ("finished", 0)
    for reason, asked, expected in (("SIGUSR1", False, "requeue"), ("time budget", False, "stopped"),
                                    ("SIGINT", False, "stopped"), ("SIGUSR2", True, "requeue"),
                                    ("SIGTERM", False, "requeue")):
        marker.write_text(json.dumps({"status": "preempted", "reason": reason}))
        assert ending(run_dir, logs, 0, asked)[0] == expected
    marker.write_text(json.dumps({"status": "stopped", "reason": "the file stop"}))
    assert ending(run_dir, logs, 0, True) == ("stopped", 0)
    say(logs, 0, "error: out of memory")
    (logs / "srun.log").write_text("srun: error: node1: task 0: Exited with exit code 83\n")
    assert ending(run_dir, logs, 143, False) == ("failed", ExitCode.OUT_OF_MEMORY)


def test_status_in_one_line(attempt):
    run_dir, logs = attempt
    assert status(run_dir, logs) == "no step yet | no checkpoint yet"
    (run_dir / "config").mkdir()
    (run_dir / "config" / "run.toml").write_text("[train]\nsteps = 90\n")
    lines = [{"kind": "train", "step": 40, "loss": 2.5, "tokens_per_s": 12345.6}, {"kind": "eval", "step": 40}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, whole in ((30, True), (40, False)):
        folder = run_dir / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        if whole:
            (folder / "manifest.json").write_text("{}")
    assert status(run_dir, logs) == "step 40/90 | loss 2.5000 | 12,346 tokens/s | last checkpoint step 30"
