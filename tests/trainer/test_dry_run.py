"""--dry_run: figures against what is measured, and every preset with every shipped DeepSpeed JSON."""

import ctypes
import itertools
import json
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.timing import peak_mib
from model.attention.pattern import AttentionPattern
from model.diffusion_lm import DiffusionLM
from tests.trainer.forked import launch, run_rank
from tests.trainer.launching import ROOT, ds_config
from trainer.config_load import load
from trainer.dry_run import describe_run, longest_document, window_reach
from trainer.ds_config import load_ds_config
from trainer.memory import activation_bytes, memory_per_rank, working_bytes
from trainer.presets import PRESETS, RECIPES
from trainer.randomness import training_draw

CONFIGS = sorted(ROOT.glob("ds_configs/*.json"))


@pytest.mark.parametrize("ds", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_with_every_deepspeed_json(preset, ds):
    text = describe_run(load(preset), load_ds_config(ds), world=8)
    assert all(word in text for word in ("parameters:", "FLOPs:", "reach:", "attention:", "memory of a rank of 8"))


def test_what_only_a_gpu_can_train_is_described_without_one(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    ds = load_ds_config(ds_config(tmp_path, fp16={"enabled": True}))
    text = describe_run(load("tiny", overrides=["train.profile_steps=2-3", "train.profile_memory=true"]), ds, world=2)
    assert "precision:     fp16" in text and "\nattention:" in text
    for backend in ("model.attention.backend=torch_flash", "model.moe.backend=megablocks"):
        text, key = describe_run(load("tiny", overrides=[backend]), ds, world=2), backend.partition("=")[0]
        assert f"\nkernels:       {key}: '" in text and "memory of a rank of 2" in text


@pytest.mark.parametrize("recipe", ["diffuseq", "moe_diffuseq"])
def test_every_recipe(recipe):
    ds = load_ds_config(ROOT / "ds_configs" / "cpu_zero2.json")
    text = describe_run(load("base", recipe), ds, world=8)
    assert "parameters:" in text and ("experts:" in text) == (recipe == "moe_diffuseq")


@pytest.mark.parametrize("changes", [
    {"recipe": "diffuseq"}, {"recipe": "diffuseq", "model.layers": 5, "model.dropout": 0.0},
    {}, {"model.width": 256, "model.layers": 5}, {"model.moe.top_k": 1, "model.moe.ffn": 512}, {"data.vocab_size": 512},
    {"model.diffusion.self_conditioning": 0.5, "model.local_mixing": 0}, {"model.moe.gated": "false"}])
def test_activations_are_near_what_backward_keeps(changes):
    recipe = changes.get("recipe", "")
    run = load("tiny", recipe, overrides=[f"{key}={value}" for key, value in changes.items() if key != "recipe"])
    run = replace(run, model=replace(run.model, vocab_size=run.data.vocab_size))
    model = DiffusionLM(run.model)
    model.init_weights(0)
    batch = longest_document(run)
    plan, draw = model.prepare(batch, device="cpu", dtype=torch.float32), training_draw(batch, run.model, 0, 0)
    weights = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        report = model(batch, plan, draw, 1.0, 1.0, 1.0)
    assert report.total.requires_grad
    estimate = activation_bytes(run.model, len(batch), int(batch.is_target_T.sum()), 4)
    assert estimate == pytest.approx(sum(kept.values()), rel=0.15)


@pytest.mark.parametrize("recipe", RECIPES)
def test_memory_is_near_what_a_step_allocates(recipe):
    """Between two steps that differ in the length of their rows, by the allocations that PyTorch's profiler saw."""
    allocated, expected = [], []
    for row_tokens in (1024, 4096):
        run = load("tiny", recipe, overrides=[
            "model.width=128", "model.layers=4", "model.moe.ffn=256", "model.attention.heads=2", "data.vocab_size=1024",
            f"data.row_tokens={row_tokens}", "data.max_source_tokens=0", "data.max_target_tokens=128"])
        run = replace(run, model=replace(run.model, vocab_size=1024))
        model = DiffusionLM(run.model)
        model.init_weights(0)
        batch = longest_document(run)
        plan, draw = model.prepare(batch, device="cpu", dtype=torch.float32), training_draw(batch, run.model, 0, 0)
        model(batch, plan, draw, 1.0, 1.0, 1.0).total.backward()  # gradients are there from now on
        allocated.append(2**20 * peak_mib(
            lambda model=model, given=(batch, plan, draw): model(*given, 1.0, 1.0, 1.0).total.backward()))
        sizes = run.model, len(batch), int(batch.is_target_T.sum()), 4
        expected.append(activation_bytes(*sizes) + working_bytes(*sizes))
    assert expected[1] - expected[0] == pytest.approx(allocated[1] - allocated[0], rel=0.25)


def peak_noting_rank(command, folder, rank, world, port, mmap_threshold):
    """Writes down how far the memory of this process grows after its imports.

    mmap_threshold: from what size glibc gives a block pages of its own, in bytes, as if the process had been started
    with MALLOC_MMAP_THRESHOLD_; None where the environment does not say.
    """
    def resident(kind: str) -> int:
        return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    if mmap_threshold is not None:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(mmap_threshold)
        m_mmap_threshold = -3
        assert ctypes.CDLL(None).mallopt(m_mmap_threshold, mmap_threshold)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    run_rank(command, folder, rank, world, port)
    (folder / f"peak{rank}").write_text(str(resident("VmHWM") - before))


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "mmap_threshold", "most"), [
    *((recipe, 2**20, 1.25) for recipe in RECIPES),
    ("long_doc", None, 1.25), ("moe_diffuseq", None, 1.25), ("diffuseq", None, 1.6)])
def test_activations_are_near_what_a_run_uses(launcher, tmp_path, recipe, mmap_threshold, most):
    """Between two runs that differ in the length of their rows; all else that a process takes is in both. Blocks of
    many sizes in one heap leave holes, most of all in the dense network."""
    random = np.random.default_rng(0)
    words = np.array(["".join(letters) for letters in random.choice(list("abcdefghij"), (800, 5))])
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(
        {"src": " ".join(random.choice(words, 7000)), "trg": " ".join(random.choice(words, 800))}) + "\n"
        for _ in range(12)))
    ds, used, expected = ds_config(tmp_path, micro=1), [], []
    for row_tokens in (2048, 8192):
        sizes = {"model.width": 128, "model.layers": 4, "model.moe.ffn": 256, "model.attention.heads": 2,
                 "data.row_tokens": row_tokens, "data.max_source_tokens": 0, "data.max_target_tokens": 256,
                 "model.max_positions": 8192, "data.vocab_size": 1024, "train.steps": 3}
        settings = sizes | {"data.train": "train.jsonl", "data.valid": "", "data.test": ""}
        command = ["--ds_config", str(ds), "--recipe", recipe, "--run_dir", f"run{row_tokens}",
                   *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]
        codes, printed = launch(launcher, tmp_path, command, 1, 240,
                                rank_main=partial(peak_noting_rank, mmap_threshold=mmap_threshold))
        assert codes == [0], printed
        used.append(int((tmp_path / "peak0").read_text()))
        run = load("tiny", recipe, overrides=[f"{key}={value}" for key, value in sizes.items()])
        run = replace(run, model=replace(run.model, vocab_size=run.data.vocab_size))
        expected.append(sum(memory_per_rank(run, load_ds_config(ds), 1, 0, 0).values()))
    assert 0.75 < (used[1] - used[0]) / (expected[1] - expected[0]) < most


def test_states_follow_zeros_rules():
    run, parameters = load("tiny"), 1_000_000
    sizes = {name: memory_per_rank(run, load_ds_config(ROOT / "ds_configs" / f"{name}.json"), 4, parameters, 0)
             for name in ("zero1", "zero2", "zero3")}
    expected = {"zero1": (2, 2), "zero2": (2, 0.5), "zero3": (0.5, 0.5)}
    for name, (weights, gradients) in expected.items():
        assert sizes[name]["parameters"] == weights * parameters
        assert sizes[name]["gradients"] == gradients * parameters
        assert (sizes[name]["fp32 copy"], sizes[name]["Adam moments"]) == (1e6, 2e6)


def test_rows_of_short_sources_need_the_most():
    text = describe_run(load("tiny"), load_ds_config(ROOT / "ds_configs" / "cpu_zero2.json"), world=1)
    longest, most = (float(re.search(rf"  {name} +([\d.]+) GiB", text)[1]) for name in ("in all", "in all, at most"))
    assert 0 < longest < most


def test_expert_shards_are_described():
    run = load("tiny", overrides=["train.expert_parallel_size=4"])
    text = describe_run(run, load_ds_config(ROOT / "ds_configs" / "cpu_zero2.json"), world=8)
    whole = describe_run(load("tiny"), load_ds_config(ROOT / "ds_configs" / "cpu_zero2.json"), world=8)
    assert "expert groups: 4 ranks hold 2 experts of each layer each" in text and "expert groups:" not in whole

    def gib(text: str, name: str) -> float:
        return next(float(line.split()[-2]) for line in text.splitlines() if line.strip().startswith(name + " "))

    experts = 3 * 8 * 3 * 256 * 128  # layers, experts, w1 to w3, ffn, width
    assert gib(whole, "parameters") - gib(text, "parameters") == pytest.approx(4 * experts * 3 / 4 / 2**30, abs=1e-3)
    for name in ("gradients", "fp32 copy", "Adam moments", "averaged weights"):  # partitions of the same size
        assert gib(whole, name) == gib(text, name)


@pytest.mark.parametrize("layers", [
    [((2, 2), (1,))], [((2, 1), (3,)), ((1, 1), (1, 2))], [((1, 1), (4,)), ((1, 1), (4,))], [((3, 0), (1, 2))] * 3])
def test_reach_is_that_of_all_paths_through_the_windows(layers):
    patterns = [AttentionPattern(window=window, dilations=dilations, cached=False) for window, dilations in layers]
    steps = [sorted({k * d for d in dilations for k in range(-left, right + 1)}) for (left, right), dilations in layers]
    offsets = {sum(path) for path in itertools.product(*steps)}
    reach, density = window_reach(patterns)
    assert reach == (-min(offsets), max(offsets))
    assert density == pytest.approx(len(offsets) / (max(offsets) - min(offsets) + 1))
