"""Whole runs: ranks and ZeRO stages change nothing, and an interrupted run ends as an uninterrupted one."""

import json
import signal
import time

import pytest
from safetensors.torch import load_file

from tests.trainer.launching import ROOT, ds_config, finish, lines, start, write_corpus
from trainer.config_load import load

# What keeps state or randomness of its own beside the weights.
MECHANISMS = {"model.diffusion.time_sampling": "adaptive", "model.diffusion.source_dropout": 0.2,
              "model.diffusion.self_conditioning": 0.5}
LOSSES = ("loss", "cross_entropy", "balance", "router_z", "gradient_norm")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a corpus, its settings, and one finished reference run on one rank."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {**write_corpus(folder), **MECHANISMS}
    reference = folder / "reference"
    evaluated = {**settings, "train.eval_every": 10, "train.sample_every": 20}
    finish(start(1, ds_config(folder, micro=2, stage=1), reference, evaluated))
    return folder, settings, reference


@pytest.mark.parametrize("world, stage", [pytest.param(1, 3, marks=pytest.mark.slow), (2, 1), (2, 2), (2, 3)])
def test_ranks_and_zero_stages_give_the_same_losses(workplace, world, stage):
    folder, settings, reference = workplace
    run_dir = folder / f"world{world}-zero{stage}"
    evaluated = {**settings, "train.eval_every": 10, "train.sample_every": 20}
    finish(start(world, ds_config(folder, micro=2 // world, stage=stage), run_dir, evaluated))
    expected, found = lines(reference), lines(run_dir)
    assert len(expected) == len(found) == 20
    for one, other in zip(expected, found, strict=True):
        for name in LOSSES:
            assert other[name] == pytest.approx(one[name], rel=1e-5), (one["step"], name)
    for one, other in zip(lines(reference, "eval"), lines(run_dir, "eval"), strict=True):
        for name in ("cross_entropy_model", "cross_entropy_shuffled_sources", "cross_entropy_context_free"):
            assert other[name] == pytest.approx(one[name], rel=1e-5)
    assert other["cross_entropy_model"] < other["cross_entropy_context_free"]  # it has learnt something to compare
    assert ((run_dir / "samples" / "step-00000020.jsonl").read_text()
            == (reference / "samples" / "step-00000020.jsonl").read_text())
    weights, others = (load_file(path / "model" / "model.safetensors") for path in (reference, run_dir))
    assert weights.keys() == others.keys()
    assert all((weights[name] - others[name]).abs().max() < 1e-4 for name in weights)


DIFFUSEQ = {"model.moe.experts": 1, "model.attention.window": 128, "model.diffusion.self_conditioning": 0.0,
            "model.diffusion.time_sampling": "loss_second_moment"}
"""What DiffuSeq has in place of the settings of the workplace."""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["diffuseq", "moe_diffuseq"])
def test_the_papers_recipes_train_evaluate_and_generate(workplace, recipe):
    folder, settings, _ = workplace
    run_dir = folder / recipe
    settings = {**settings, "data.draws_per_source": 1, "train.steps": 6, "train.eval_every": 3,
                "train.sample_every": 6}
    terms = {"mse", "rounding", "cross_entropy"}
    if recipe == "diffuseq":
        settings |= DIFFUSEQ
        terms |= {"terminal"}
    finish(start(1, ds_config(folder, micro=1, stage=1), run_dir, settings, "--recipe", recipe))
    train, evaluated = lines(run_dir), lines(run_dir, "eval")
    assert terms <= train[-1].keys() and train[-1]["loss"] < train[0]["loss"]
    assert len(evaluated) == 2 and evaluated[-1]["tokens"] > 0
    assert len((run_dir / "samples" / "step-00000006.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_time_sampling_by_loss_is_the_same_on_ranks_and_after_a_resume(workplace):
    """In 4 steps of time, so that the losses decide after a few training steps; with dropout and noised embeddings."""
    folder, settings, _ = workplace
    settings = {**settings, "data.draws_per_source": 1, "train.steps": 20, "train.save_every": 14,
                "model.diffusion.steps": 4, **DIFFUSEQ}
    one, two = folder / "losses-1", folder / "losses-2"
    ds = ds_config(folder, micro=2, stage=2)
    finish(start(1, ds, one, settings, "--recipe", "diffuseq"))
    finish(start(2, ds_config(folder, micro=1, stage=2), two, settings, "--recipe", "diffuseq"))
    names = ("loss", "mse", "rounding", "terminal", "cross_entropy", "gradient_norm")
    for single, double in zip(lines(one), lines(two), strict=True):
        for name in names:
            assert double[name] == pytest.approx(single[name], rel=1e-4), (single["step"], name)
    checkpoint = one / "checkpoints" / "step-00000014"
    seen = json.loads((checkpoint / "manifest.json").read_text())["time_sampling"]["seen"]
    assert min(seen) >= 10  # warmed up
    before = lines(one)
    finish(start(1, ds, one, settings, "--recipe", "diffuseq", "--resume", str(checkpoint)))
    for first, again in zip(before, lines(one), strict=True):
        assert all(first[name] == again[name] for name in names), first["step"]


def test_a_run_keeps_what_it_was_made_with(workplace):
    *_, reference = workplace
    environment = json.loads((reference / "config" / "environment.json").read_text())
    assert environment["kernels"]["attention"].startswith("cpu_band (the fastest on 'cpu'")
    assert environment["packages"]["deepspeed"] == "0.19.8" and environment["commit"]
    assert load(file=reference / "config" / "run.toml").model.width == 32


@pytest.mark.slow
def test_accumulated_micro_batches_equal_one_large_one(workplace):
    folder, settings, _ = workplace
    run_dir = folder / "accumulated"
    finish(start(1, ds_config(folder, micro=1, accumulation=2, stage=2), run_dir, {**settings, "train.steps": 10,
                                                                                   "optim.schedule": "constant"}))
    other = folder / "large"
    finish(start(1, ds_config(folder, micro=2, stage=2), other, {**settings, "train.steps": 10,
                                                                 "optim.schedule": "constant"}))
    for one, two in zip(lines(run_dir), lines(other), strict=True):
        for name in LOSSES:
            assert one[name] == pytest.approx(two[name], rel=1e-5)


@pytest.mark.parametrize("number", [
    signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_interrupted_run_resumes_to_the_same_weights(workplace, number):
    """A signal to one rank: both save the same step and exit 0; the next start ends bit-equal to an unbroken run."""
    folder, settings, _ = workplace
    settings = {**settings, "train.steps": 30}
    ds = ds_config(folder, micro=1, stage=2)
    whole, broken = folder / "whole", folder / f"broken-{number}"
    if not whole.exists():
        finish(start(2, ds, whole, settings))
    ranks = start(2, ds, broken, settings)
    while not (broken / "metrics.jsonl").exists() or len(lines(broken)) < 5:
        assert ranks[0].poll() is None, ranks[0].communicate()[0]
        time.sleep(0.02)
    ranks[1].send_signal(number)
    assert "stopped on request" in finish(ranks)
    assert '"preempted"' in (broken / "status.json").read_text()
    stopped_at = lines(broken)[-1]["step"]
    assert 5 <= stopped_at < 30 and not (broken / "model").exists()
    (saved,) = (json.loads(path.read_text()) for path in broken.glob("checkpoints/*/manifest.json"))
    assert sum(saved["time_sampling"][1]) > 0
    assert "resumed from" in finish(start(2, ds, broken, settings))
    assert '"done"' in (broken / "status.json").read_text()
    for one, other in zip(lines(whole), lines(broken), strict=True):
        assert all(one[name] == other[name] for name in LOSSES), one["step"]
    assert ((whole / "model" / "model.safetensors").read_bytes()
            == (broken / "model" / "model.safetensors").read_bytes())


def test_damaged_checkpoint_is_passed_over_aloud(workplace):
    folder, settings, _ = workplace
    settings = {**settings, "train.save_every": 4, "train.steps": 8}
    ds, run_dir = ds_config(folder, micro=1, stage=2), folder / "damaged"
    finish(start(1, ds, run_dir, settings))
    checkpoints = sorted((run_dir / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-00000004", "step-00000008"]
    victim = next((checkpoints[1] / "engine").glob("*optim_states.pt"))
    damaged = bytearray(victim.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    victim.write_bytes(damaged)
    (checkpoints[1] / "unrelated").write_text("")
    printed = finish(start(1, ds, run_dir, settings))
    assert "passing over a damaged checkpoint" in printed and victim.name in printed
    assert "resumed from" in printed and "step-00000004" in printed


def test_another_topology_or_configuration_is_refused(workplace):
    folder, settings, reference = workplace
    printed = finish(start(1, ds_config(folder, micro=2, stage=2), reference, settings), expect=84)
    assert "zero_stage = 1, this run has zero_stage = 2" in printed and "Traceback" not in printed
    printed = finish(start(2, ds_config(folder, micro=1, stage=1), reference, {**settings, "model.width": 64}),
                     expect=80)
    assert printed.count("belongs to another configuration (model.width was 32, is 64)") == 1
    printed = finish(start(1, ds_config(folder, micro=2, stage=1), reference, settings, "--resume", "none"), expect=80)
    assert "holds checkpoints" in printed


@pytest.mark.slow
def test_training_starts_from_an_exported_model(workplace):
    folder, settings, reference = workplace
    run_dir = folder / "continued"
    finish(start(1, ds_config(folder, micro=2, stage=1), run_dir, {**settings, "train.steps": 3, "optim.lr": 1e-9},
                 "--init_from", str(reference)))
    before, after = (load_file(path / "model" / "model.safetensors") for path in (reference, run_dir))
    assert all((before[name] - after[name]).abs().max() < 1e-6 for name in before)
    printed = finish(start(1, ds_config(folder, micro=2, stage=1), folder / "misfit", {**settings, "model.width": 64},
                           "--init_from", str(reference / "model")), expect=84)
    assert "does not fit this model" in printed and "Traceback" not in printed


@pytest.mark.slow
def test_bf16_stays_near_fp32(workplace):
    folder, settings, reference = workplace
    run_dir = folder / "bf16"
    finish(start(2, ds_config(folder, micro=1, stage=1, bf16={"enabled": True}), run_dir, settings))
    for one, other in zip(lines(reference), lines(run_dir), strict=True):
        assert other["cross_entropy"] == pytest.approx(one["cross_entropy"], rel=0.01)


@pytest.mark.slow
def test_time_budget_stops_the_run_early(workplace):
    folder, settings, _ = workplace
    run_dir = folder / "budget"
    printed = finish(start(1, ds_config(folder, micro=1, stage=2), run_dir,
                           {**settings, "train.steps": 100000, "train.max_minutes": 0.05}))
    assert "time budget" in printed and '"preempted"' in (run_dir / "status.json").read_text()


def test_dry_run_needs_no_ranks_and_no_data(workplace):
    folder, settings, _ = workplace
    printed = finish(start(1, ROOT / "ds_configs" / "cpu_zero2.json", folder / "dry",
                           {**settings, "data.train": "missing.jsonl"}, "--dry_run"))
    assert "parameters:" in printed and not (folder / "dry").exists()


@pytest.mark.slow
def test_resuming_from_a_named_checkpoint_and_after_the_end(workplace):
    folder, settings, _ = workplace
    settings = {**settings, "train.save_every": 4, "train.steps": 8}
    ds, run_dir = ds_config(folder, micro=1, stage=2), folder / "named"
    finish(start(1, ds, run_dir, settings))
    before = lines(run_dir)
    assert "step-00000008" in finish(start(1, ds, run_dir, settings))
    assert lines(run_dir) == before
    finish(start(1, ds, run_dir, settings, "--resume", str(run_dir / "checkpoints" / "step-00000004")))
    assert [line["cross_entropy"] for line in lines(run_dir)] == [line["cross_entropy"] for line in before]
