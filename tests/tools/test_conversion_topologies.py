"""Converted checkpoints against those that runs write themselves, trained on, loaded by DeepSpeed, and in memory."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.diffusion_lm import DiffusionLM
from tests.tools.converting import Runs, assert_same_state, call
from tests.tools.test_conversion import assert_same_files
from tests.trainer.forked import free_port, join
from tests.trainer.launching import ROOT, lines
from tools import convert_checkpoint
from tools.conversion.convert import open_source
from tools.conversion.layout import Topology, empty_model
from tools.conversion.reshard import write_checkpoint
from trainer.errors import ExitCode

pytestmark = pytest.mark.slow
LOSSES = ("loss", "cross_entropy", "balance", "router_z")


@pytest.fixture(scope="module")
def runs(launcher, tmp_path_factory):
    return Runs(launcher, tmp_path_factory.mktemp("topologies"))


@pytest.fixture
def convert(monkeypatch, capsys):
    return lambda *arguments: call(monkeypatch, capsys, convert_checkpoint, *arguments)


def to(world, shards, stage):
    return ("--format", "checkpoint", "--world", world, "--expert_parallel_size", shards, "--zero_stage", stage)


@pytest.mark.parametrize("world, shards, stage, ds", [
    (4, 2, 1, {}), (4, 2, 2, {"bf16": {"enabled": True}}), (4, 2, 3, {}), (2, 1, 3, {"bf16": {"enabled": True}}),
    (2, 2, 3, {"zero_optimization": {"stage": 3, "sub_group_size": 2000}})])
def test_files_are_those_of_a_run_on_the_same_topology(runs, convert, tmp_path, world, shards, stage, ds):
    native = runs.run(tmp_path.name, world, shards, stage, 2, **ds)
    convert(native, tmp_path / "one", *to(1, 1, 1))
    convert(tmp_path / "one", tmp_path / "back", *to(world, shards, stage))
    folder = next((native / "checkpoints").glob("step-*"))
    assert_same_state(open_source(folder), open_source(tmp_path / "back"))
    assert_same_files(folder, tmp_path / "back")


def test_a_layout_that_is_not_known_is_refused(runs, convert, tmp_path):
    ds = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    run = runs.run(tmp_path.name, 2, 2, 2, 2, **ds)
    with pytest.raises(SystemExit) as left:
        convert(run, tmp_path / "converted", *to(2, 2, 2))
    assert left.value.code == ExitCode.CHECKPOINT and not (tmp_path / "converted").exists()


def test_training_goes_on_through_topologies_as_uninterrupted(runs, convert):
    """1 -> 2 -> 4 -> 1 ranks, 1 -> 2 -> 4 -> 1 shards of experts, ZeRO 1, 2, 3."""
    whole = lines(runs.run("whole", 1, 1, 1, 8))
    here = runs.run("leg0", 1, 1, 1, 2)
    found = lines(here)
    for leg, (world, shards, stage) in enumerate([(2, 2, 3), (4, 4, 2), (1, 1, 1)], 1):
        target = runs.folder / f"converted{leg}"
        convert(here, target, *to(world, shards, stage))
        here = runs.run(f"leg{leg}", world, shards, stage, 2 * (leg + 1), "--resume", str(target))
        found += lines(here)
    assert [line["step"] for line in found] == list(range(1, 9))
    for one, other in zip(whole, found, strict=True):
        for name in LOSSES:
            assert other[name] == pytest.approx(one[name], rel=1e-6), (one["step"], name)


def loading_rank(folder, rank, world, port):
    """One rank: DeepSpeed's own loading of a universal checkpoint in ZeRO-3; writes down the whole weights."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import deepspeed

    from model.moe.parallel import ExpertGroup, whole_state
    from trainer import launch
    from trainer.expert_parallel import shard_experts
    from trainer.parameter_groups import parameter_groups

    launch.start()
    model = DiffusionLM(open_source(folder / "universal").run.model)
    shard_experts(model, ExpertGroup(2, rank % 2))
    model.init_weights(1)
    engine = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(parameter_groups(model, 0.01)),
        config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
                "checkpoint": {"load_universal": True}})[0]
    engine.load_checkpoint(str(folder), tag="universal")
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        state = whole_state(engine.module, dict(engine.module.named_parameters()))
        if rank == 0:
            torch.save({name: value.detach().clone() for name, value in state.items()}, folder / "loaded.pt")
    launch.stop()


def test_deepspeed_loads_the_universal_layout(runs, convert, launcher, tmp_path):
    run = runs.run(tmp_path.name, 1, 1, 1, 2)
    convert(run, tmp_path / "universal", "--format", "universal")
    port = free_port()
    codes = join([launcher.Process(target=loading_rank, args=(tmp_path, rank, 2, port)) for rank in range(2)], 240)
    assert codes == [0, 0]
    source, loaded = open_source(run), torch.load(tmp_path / "loaded.pt")
    assert loaded.keys() == source.shapes.keys()
    differ = {name: float((value - source.whole("fp32", name)).abs().max()) for name, value in loaded.items()}
    assert not {name: value for name, value in differ.items() if value}


def peak_anonymous(command: list[str]) -> int:
    """Bytes: the largest sum of anonymous memory over a process and its children, looked at often."""
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        total = 0
        for pid in [process.pid, *_children(process.pid)]:
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
        peak = max(peak, total)
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    assert process.returncode == 0
    return peak


def _children(pid: int) -> list[int]:
    try:
        direct = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [each for child in direct for each in (child, *_children(child))]


def write_large(folder, source, parameters: int) -> None:
    """A checkpoint of about so many parameters, of zeros with holes: world 4, 2 shards, ZeRO 2."""
    model = source.run.model
    ffn = parameters // (3 * model.layers * model.moe.experts * model.width) // 8 * 8
    run = replace(source.run, model=replace(model, moe=replace(model.moe, ffn=ffn)))

    class Zeros(type(source)):
        def __init__(self):
            self.run, self.training, self.kinds, self.step = run, source.training, source.kinds, source.step
            self.buffers = source.buffers
            self.shapes = {name: p.shape for name, p in empty_model(run.model).named_parameters()}

        def pieces(self, kind, name, start, stop):
            yield torch.zeros(1).expand(stop - start)

    folder.mkdir()
    write_checkpoint(folder, Zeros(), Topology(4, 2, 2), source.vocabulary)


@pytest.mark.parametrize("form", [to(2, 1, 3), ("--format", "safetensors"), ("--format", "universal"),
                                  ("--format", "huggingface", "--shard_gb", "1")], ids=str)
def test_memory_stays_near_the_largest_shard(runs, tmp_path, form):
    """CONVERSION_GB: gigabytes of fp32 weights; their shards are 3/4 of it each."""
    size = float(os.environ.get("CONVERSION_GB", "0.3")) * 1e9
    folder = runs.folder / f"large-{size:.0f}"
    if not folder.exists():
        start = runs.folder / "small"
        if not start.exists():
            runs.run("small", 1, 1, 2, 1)
        write_large(folder, open_source(start), int(size / 4))
    shard = max(path.stat().st_size for path in folder.rglob("*.pt"))
    peak = peak_anonymous([sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), str(folder),
                           str(tmp_path / "to"), *map(str, form)])
    print(json.dumps({"weights": size, "largest shard": shard, "peak": peak}))
    assert peak < 1.5 * shard + 1e9
    assert peak < 0.8e9  # what holds besides, at any size: no shard is held
