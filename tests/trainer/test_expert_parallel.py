"""Whole runs with experts divided among ranks: equal to a single process, resumed to the bit, exported whole."""

import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.diffusion_lm import DiffusionLM
from model.moe.parallel import ExpertGroup
from tests.trainer.forked import free_port, join, launch, run_rank
from tests.trainer.launching import SMALL, command_line, ds_config, lines, write_corpus
from trainer.config_load import load
from trainer.ds_config import DSConfig, load_ds_config
from trainer.export import read_model
from trainer.memory import memory_per_rank

SECONDS = 300
LOSSES = ("loss", "cross_entropy", "balance", "router_z", "gradient_norm")
ROWS, STEPS, CLIPPING = 8, 20, 0.1
SAMPLED = {"train.eval_every": 10, "train.sample_every": 20}
slow = pytest.mark.slow


class Workplace:
    """A folder with a corpus, where runs of the small model are made. Every step has ROWS rows, whatever the world."""

    def __init__(self, launcher, folder):
        self.launcher, self.folder = launcher, folder
        self.corpus = write_corpus(folder)
        self.references = {}

    def reference(self, settings):
        """The name of a run with these settings on one rank."""
        key = str(settings)
        if key not in self.references:
            self.references[key] = f"reference{len(self.references)}"
            self.run(self.references[key], 1, 1, 1, settings)
        return self.references[key]

    def run(self, name, world, shards, stage, settings=None, *arguments, accumulation=1, expect=0, rank_main=run_rank,
            seconds=SECONDS, **ds):
        """(metrics by step, what was printed) of a run in the folder `name`, whose ranks all end with `expect`."""
        config = ds_config(self.folder, micro=ROWS // world // accumulation, accumulation=accumulation, stage=stage,
                           gradient_clipping=CLIPPING, **ds)
        settings = {**self.corpus, "train.steps": STEPS, "optim.schedule": "constant",
                    "train.expert_parallel_size": shards, **(settings or {})}
        command = [*command_line(config, self.folder / name, settings), *arguments]
        codes, outputs = launch(self.launcher, self.folder, command, world, seconds, rank_main=rank_main)
        printed = "\n".join(outputs)
        assert codes == [expect] * world, printed
        return lines(self.folder / name), printed

    def weights(self, name):
        return load_file(self.folder / name / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def workplace(launcher, tmp_path_factory):
    place = Workplace(launcher, tmp_path_factory.mktemp("experts"))
    reference, _ = place.run("reference", 1, 1, 1, SAMPLED)
    assert min(line["gradient_norm"] for line in reference) > CLIPPING  # every step is clipped
    return place


def assert_equal_losses(wanted, found, loss=1e-5, gradient_norm=1e-6):
    assert len(wanted) == len(found) > 0
    for one, other in zip(wanted, found, strict=True):
        for name in LOSSES:
            tolerance = {"rel": gradient_norm} if name == "gradient_norm" else {"rel": loss, "abs": loss}
            assert other[name] == pytest.approx(one[name], **tolerance), (one["step"], name)


def assert_equal_weights(wanted, found, tolerance):
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert value.shape == found[name].shape and (value - found[name]).abs().max() <= tolerance, name


FAST = {(2, 2, 3), (4, 2, 2)}
GRID = [(world, shards, stage) for world in (1, 2, 4, 8) for shards in (1, 2, 4) if world % shards == 0
        for stage in (1, 2, 3)]


@pytest.mark.parametrize("world, shards, stage",
                         [pytest.param(*case, marks=() if case in FAST else slow) for case in GRID])
def test_ranks_shards_and_zero_stages_give_the_same_losses(workplace, world, shards, stage):
    name = f"world{world}-shards{shards}-zero{stage}"
    found, _ = workplace.run(name, world, shards, stage, SAMPLED if world < 8 else {})
    reference = workplace.folder / "reference"
    assert_equal_losses(lines(reference), found)
    assert_equal_weights(workplace.weights("reference"), workplace.weights(name), 1e-5)
    if world < 8:
        for one, other in zip(lines(reference, "eval"), lines(workplace.folder / name, "eval"), strict=True):
            for key in ("cross_entropy_model", "cross_entropy_shuffled_sources"):
                assert other[key] == pytest.approx(one[key], rel=1e-5)
        sample = f"samples/step-{STEPS:08d}.jsonl"
        assert (reference / sample).read_text() == (workplace.folder / name / sample).read_text()
    assert all(("expert_traffic_mb" in line) == (shards > 1) for line in found)
    if shards > 1:  # between each token once and once for each of its two experts
        assert all(0 < line["expert_traffic_minimum_mb"] <= line["expert_traffic_mb"]
                   <= 2 * line["expert_traffic_minimum_mb"] for line in found)
    model, _, run = read_model(workplace.folder / name / "model")
    assert run.train.expert_parallel_size == shards
    assert model.denoiser.blocks[0].moe.experts.w1.shape[0] == run.model.moe.experts
    shutil.rmtree(workplace.folder / name)


@pytest.mark.parametrize("settings, ds", [
    ({}, {"accumulation": 2}),
    ({"train.activation_checkpointing": "all"}, {}),
    ({"model.moe.shared_ffn": 16, "model.moe.jitter": 0.1, "optim.ema_decay": 0.0}, {}),
    ({"model.diffusion.self_conditioning": 0.5, "model.moe.balance_weight": 0.0, "model.moe.z_weight": 0.0}, {}),
    ({"model.moe.backend": "reference", "model.moe.top_k": 3}, {}),
    ({}, {"zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 2000}}),
    ({}, {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}),
    ({}, {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 2000}}),
    ({}, {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": True}}),
    ({"train.activation_checkpointing": "all"}, {"accumulation": 2, "zero_optimization": {"stage": 3}}),
], ids=str)
@slow
def test_mechanisms_give_the_losses_of_a_single_process(workplace, request, settings, ds):
    settings = {**settings, "train.steps": 10}
    reference, name = workplace.reference(settings), request.node.name
    found, _ = workplace.run(name, 4, 2, 2, settings, **ds)
    assert_equal_losses(lines(workplace.folder / reference), found)
    assert_equal_weights(workplace.weights(reference), workplace.weights(name), 1e-5)


def norms_keeping_rank(command, folder, rank, world, port):
    """Writes down the gradient norm of each step as this rank sees it."""
    from trainer.engine import Engine
    update = Engine.update

    def update_and_note(engine, step, **options):
        rate = update(engine, step, **options)
        with (folder / f"norms{rank}.txt").open("w" if step == 0 else "a") as file:
            print(engine.gradient_norm, file=file)
        return rate

    Engine.update = update_and_note
    run_rank(command, folder, rank, world, port)


@slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_ranks_clip_by_the_same_norm(workplace, stage):
    found, _ = workplace.run(f"norms-{stage}", 4, 2, stage, {"train.steps": 3}, rank_main=norms_keeping_rank)
    wanted = "".join(f"{line['gradient_norm']}\n" for line in found)
    assert len(found) == 3 and all((workplace.folder / f"norms{rank}.txt").read_text() == wanted for rank in range(4))


def offloading_rank(*arguments):
    """Offload is refused on a CPU, where it has no use; its arithmetic is the same there as on a GPU. DeepSpeed's
    optimizer for it is compiled first."""
    os.environ |= {"TORCH_EXTENSIONS_DIR": str(arguments[1] / "extensions"),
                   "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    DSConfig.check_device = lambda *_: None
    run_rank(*arguments)


@slow
def test_offloaded_optimizer_gives_the_losses_of_a_single_process(workplace):
    settings, offload = {"train.steps": 10}, {"offload_optimizer": {"device": "cpu"}}
    reference = workplace.reference(settings)
    for name, world, stage in (("offload-two", 2, 2), ("offload-four", 4, 1)):
        found, _ = workplace.run(name, world, 2, stage, settings, rank_main=offloading_rank,
                                 seconds=600, zero_optimization={"stage": stage, **offload})
        assert_equal_losses(lines(workplace.folder / reference), found)


@slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_stays_near_fp32(workplace, stage):
    found, _ = workplace.run(f"bf16-{stage}", 4, 2, stage, bf16={"enabled": True})
    for one, other in zip(lines(workplace.folder / "reference"), found, strict=True):
        assert other["cross_entropy"] == pytest.approx(one["cross_entropy"], rel=0.01)


@pytest.mark.parametrize("world, shards, stage", [(2, 2, 2), pytest.param(4, 2, 1, marks=slow),
                                                  pytest.param(2, 2, 3, marks=slow), pytest.param(4, 2, 3, marks=slow)])
def test_resumed_to_the_bit_and_bound_to_the_number_of_shards(workplace, world, shards, stage):
    name = f"resumed-world{world}-zero{stage}"
    settings = {"train.steps": 8, "train.save_every": 4}
    unbroken, _ = workplace.run(name, world, shards, stage, settings)
    exported = (workplace.folder / name / "model" / "model.safetensors").read_bytes()
    checkpoints = workplace.folder / name / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000008")
    _, printed = workplace.run(name, world, 1, stage, settings, expect=84)
    assert (f"step-00000004 was saved with expert_parallel_size = {shards}, this run has expert_parallel_size = 1: "
            "start it as it was saved, or convert it: python tools/convert_checkpoint.py "
            f"{checkpoints / 'step-00000004'} TO --format checkpoint --world {world} --expert_parallel_size 1 "
            f"--zero_stage {stage}\n") in printed and "Traceback" not in printed
    resumed, printed = workplace.run(name, world, shards, stage, settings)
    assert "resumed from" in printed
    for one, other in zip(unbroken, resumed, strict=True):
        assert all(one[key] == other[key] for key in LOSSES), one["step"]
    assert (workplace.folder / name / "model" / "model.safetensors").read_bytes() == exported


@slow
@pytest.mark.parametrize("shards, stage", [(2, 3), (4, 1), (2, 2)])
def test_all_tokens_on_one_rank_and_none_on_the_others(workplace, shards, stage):
    """Started from a model whose routers only know experts 0 and 1: opposite rows, one of which wins for every token,
    against zeros. With two shards rank 0 holds both; with four, ranks 2 and 3 have nothing to do."""
    settings = {"model.moe.top_k": 1, "train.steps": 5, "optim.lr": 1e-6, "model.moe.balance_weight": 0.0,
                "model.moe.z_weight": 0.0}
    origin = workplace.folder / "lopsided"
    if not origin.exists():
        workplace.run("lopsided", 1, 1, 1, {**settings, "train.steps": 1})
        weights = workplace.weights("lopsided")
        for name in [name for name in weights if name.endswith("router.weight")]:
            row = 10 * torch.randn(weights[name].shape[1], generator=torch.Generator().manual_seed(0))
            weights[name] = torch.stack((row, -row, 0 * row, 0 * row))
        save_file(weights, origin / "model" / "model.safetensors")
    wanted, _ = workplace.run(f"whole-{shards}-{stage}", 1, 1, 1, settings, "--init_from", str(origin))
    found, _ = workplace.run(f"shards{shards}-{stage}", shards, shards, stage, settings, "--init_from", str(origin))
    for line in found:
        *inner, last = line["expert_share_by_position"]
        assert any(map(any, last)) and not any(last[0])  # targets only pass the last layer, and none begins a document
        assert all(share[2:] == [0, 0] and sum(share) == pytest.approx(1)
                   for layer in (*inner, filter(any, last)) for share in layer)
    assert_equal_losses(wanted, found)


def state_sizes(rank, world, shards, ds, folder, port):
    """One rank: builds the engine and writes down how many bytes its states have."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from trainer import launch
    from trainer.engine import Engine
    from trainer.expert_parallel import shard_experts

    ranks, run, ds = launch.start(), small_run(shards), load_ds_config(ds)
    model = DiffusionLM(run.model)
    shard_experts(model, ExpertGroup(shards, rank % shards))
    model.init_weights(0)
    engine = Engine(model, run, ds, ranks)
    held = [p.ds_tensor if ds.zero_stage == 3 else p for p in engine.model.parameters()]
    sizes = {"parameters": held, "fp32 copy": engine._masters(), "averaged weights": engine.ema}
    torch.save({name: sum(part.numel() * part.element_size() for part in parts) for name, parts in sizes.items()},
               folder / f"rank{rank}.pt")
    launch.stop()


def small_run(shards):
    settings = {**SMALL, "model.vocab_size": 330, "train.expert_parallel_size": shards}
    return load(overrides=[f"{key}={value}" for key, value in settings.items()])


@pytest.mark.parametrize("world, shards, stage", [(4, 2, 1), pytest.param(4, 4, 2, marks=slow),
                                                  pytest.param(4, 2, 3, marks=slow)])
def test_memory_table_is_what_a_rank_holds(launcher, tmp_path, world, shards, stage):
    ds, port = ds_config(tmp_path, stage=stage), free_port()
    codes = join([launcher.Process(target=state_sizes, args=(rank, world, shards, ds, tmp_path, port))
                  for rank in range(world)], SECONDS)
    assert codes == [0] * world
    run = small_run(shards)
    model = DiffusionLM(run.model)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    table = memory_per_rank(run, load_ds_config(ds), world, total, experts)
    padding = 4 * world * len(list(model.parameters()))  # ZeRO fills partitions up to equal sizes
    for rank in range(world):
        for name, size in torch.load(tmp_path / f"rank{rank}.pt").items():
            assert 0 <= size - table[name] <= (0 if name == "parameters" and stage < 3 else padding), (rank, name)
