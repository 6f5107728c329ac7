"""Steps that are skipped: which ones, on all ranks together, and without a trace in what is trained."""

import json
import math
import os
import random
from dataclasses import replace

import pytest
import torch

from tests.model.small import batch_of, small_config
from tests.trainer.faults import NanNoise, run_with_fault
from tests.trainer.forked import free_port, join
from tests.trainer.launching import command_line, ds_config, lines, write_corpus
from trainer.guard import LEAST, Guard

SECONDS = 240


def guard_after(losses, limit=20.0) -> Guard:
    guard = Guard(limit)
    for loss in losses:
        assert guard.judge([loss]) is None
        guard.applied(loss)
    return guard


def noisy(count=200, seed=0) -> list[float]:
    rng = random.Random(seed)
    return [3.0 + rng.gauss(0, 0.1) for _ in range(count)]


def test_ranks_whose_loss_is_not_finite_are_named():
    trouble = Guard(20.0).judge([1.0, math.nan, 2.0, math.inf])
    assert trouble.ranks == [1, 3] and "not finite" in trouble.what


def test_a_spike_exceeds_the_median_by_the_limit():
    guard = guard_after(noisy())
    assert guard.judge([2.0, 2.5]) is None  # 15 standard deviations
    assert guard.judge([2.0, 3.5]).ranks == [1]  # 25
    assert Guard(0.0).judge([1e9]) is None and guard_after(noisy(), limit=0).judge([1e9]) is None


def test_few_or_constant_losses_make_no_spikes():
    assert guard_after(noisy(LEAST - 1)).judge([1e9]) is None
    constant = guard_after([3.0] * 64)
    assert constant.judge([3.5]) is None and constant.judge([3.7]) is not None  # 1 % of the median counts as noise


def test_skipped_losses_do_not_widen_the_band():
    guard = guard_after(noisy())
    for _ in range(500):
        assert guard.judge([9.0]) is not None
        guard.skip()
    assert guard.in_a_row == guard.skipped == 500
    guard.applied(3.0)
    assert guard.in_a_row == 0 and guard.skipped == 500


def test_state_survives_json():
    guard = guard_after(noisy())
    guard.skip()
    other = Guard(20.0)
    other.load(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state() and other.judge([9.0]) == guard.judge([9.0])


def train_with_a_discarded_step(rank, world, port, folder, stage, precision):
    """Two engines, one of which is given a third batch and told to forget it; their states must be equal."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    from model.diffusion_lm import DiffusionLM
    from trainer import launch
    from trainer.config import RunConfig
    from trainer.ds_config import load_ds_config
    from trainer.engine import Engine
    from trainer.randomness import training_draw

    ranks = launch.start()
    enabled = {} if precision == "fp32" else {precision: {"enabled": True}}
    ds = load_ds_config(ds_config(folder / f"rank{rank}", micro=1, accumulation=2, stage=stage, **enabled))
    config = RunConfig(model=small_config(), data=replace(RunConfig().data, vocab_size=300))

    def engine_after(batches) -> tuple[dict, Engine]:
        model = DiffusionLM(config.model)
        model.init_weights(0)
        engine = Engine(model, config, ds, ranks)
        for step, (number, fate) in enumerate(batches):
            for part in range(2):
                batch = batch_of([2 * number + part + 10 * rank], draws=1)
                plan = engine.model.prepare(batch, device="cpu", dtype=engine.dtype)
                draw = training_draw(batch, config.model, 0, number)
                if fate == "nan" and rank == 1:
                    draw.noise_NE.fill_(math.nan)
                engine.backward(engine.forward(batch, plan, draw, 10.0, 40.0, 20.0))
                engine.accumulate(last=part == 1)
            applied = engine.update(0 if step == 0 else 1, discard=fate == "discard")
            assert (applied is not None) == (fate == "apply")
        return flat(engine.state_files(copies=False)), engine

    expected, _ = engine_after([(0, "apply"), (1, "apply")])
    for fate in ("discard", "nan"):
        found, engine = engine_after([(0, "apply"), (7, fate), (1, "apply")])
        assert engine.updates == 2
        differ = [name for name in expected.keys() | found.keys()
                  if "/random/" not in name and not torch.equal(expected[name], found[name])]
        assert not differ, (fate, differ)
    launch.stop()


def flat(files: dict) -> dict[str, torch.Tensor]:
    """Every tensor of a rank's checkpoint files, by its place in them."""
    found = {}

    def visit(item, name):
        if isinstance(item, torch.Tensor):
            found[name] = item.detach().clone()
        elif isinstance(item, dict):
            for key, value in item.items():
                visit(value, f"{name}/{key}")
        elif isinstance(item, list | tuple):
            for index, value in enumerate(item):
                visit(value, f"{name}/{index}")

    visit(files, "")
    assert sum(tensor.numel() for tensor in found.values()) > 1000
    return found


@pytest.mark.parametrize("stage, precision", [
    (1, "fp32"), (2, "bf16"), (3, "fp32"), pytest.param(1, "bf16", marks=pytest.mark.slow),
    pytest.param(2, "fp32", marks=pytest.mark.slow), pytest.param(3, "bf16", marks=pytest.mark.slow)])
def test_a_skipped_step_leaves_no_trace(launcher, tmp_path, stage, precision):
    port = free_port()
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
    codes = join([launcher.Process(target=train_with_a_discarded_step,
                                   args=(rank, 2, port, tmp_path, stage, precision)) for rank in range(2)], SECONDS)
    assert codes == [0, 0]


def run(launcher, folder, run_dir, fault, settings, world=2):
    command = command_line(ds_config(folder, micro=1, stage=2), run_dir, {**write_corpus(folder), **settings})
    return run_with_fault(launcher, folder, command, world, SECONDS, fault)


def test_a_nan_on_one_rank_skips_the_step_on_all(launcher, tmp_path):
    run_dir = tmp_path / "run"
    codes, outputs = run(launcher, tmp_path, run_dir, NanNoise(rank=1, steps=(3, 4, 9)), {"train.steps": 12})
    assert codes == [0, 0], outputs
    events = [line for line in lines(run_dir, "event") if line["event"] == "skipped"]
    assert [(each["step"], each["ranks"], each["in_a_row"], each["loss"]) for each in events] == [
        (4, [1], 1, None), (5, [1], 2, None), (10, [1], 1, None)]
    logged = lines(run_dir)
    assert [line["step"] for line in logged] == [1, 2, 3, 6, 7, 8, 9, 11, 12] and logged[-1]["skipped"] == 3
    assert all(math.isfinite(line["loss"]) for line in logged)
    assert "step 4: skipped, the loss is not finite (rank 1)" in outputs[0]


def test_too_many_in_a_row_end_the_run_with_a_whole_checkpoint(launcher, tmp_path):
    run_dir = tmp_path / "run"
    settings = {"train.steps": 30, "train.max_skipped": 3}
    codes, outputs = run(launcher, tmp_path, run_dir, NanNoise(rank=0, steps=tuple(range(5, 30))), settings)
    assert codes == [82, 82], outputs
    assert "error: step 8: 3 steps in a row were skipped" in "".join(outputs)
    manifest = json.loads((run_dir / "checkpoints" / "step-00000008" / "manifest.json").read_text())
    assert manifest["guard"]["in_a_row"] == 3 and len(manifest["guard"]["losses"]) == 5
