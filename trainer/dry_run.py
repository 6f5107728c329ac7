"""What would be trained, worked out without training it and without a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import numpy as np
import torch

from model.attention.pattern import AttentionPattern
from model.batch import PackedBatch
from model.config import ModelConfig
from model.diffusion_lm import DiffusionLM
from model.errors import BackendUnavailable
from model.flops import training_flops
from model.packing import Segment, pack
from trainer.config import RunConfig, recomputed_layers, to_toml
from trainer.ds_config import DSConfig
from trainer.kernels import DTYPES, chosen_kernels
from trainer.launch import on_gpus
from trainer.memory import memory_per_rank, target_share


def describe_run(run: RunConfig, ds: DSConfig, world: int) -> str:
    """The resolved configuration as text, then sizes, cost, reach, kernels and memory. The kernels are those of this
    machine; what it could not train is described as well, for it may be meant for another."""
    device = "cuda" if on_gpus() else "cpu"
    run = replace(run, model=replace(run.model, vocab_size=run.model.vocab_size or run.data.vocab_size))
    model, dtype = run.model, DTYPES[ds.precision]
    # Sizes and counts are the same with every backend, and the one that is asked for may not run here.
    countable = replace(model, attention=replace(model.attention, backend="reference"))
    with torch.device("meta"):
        network = DiffusionLM(countable)
    total = sum(p.numel() for p in network.parameters())
    experts = sum(p.numel() for name, p in network.named_parameters() if ".moe.experts." in name)
    active = total - experts + experts * model.moe.top_k // model.moe.experts
    batch = longest_document(run)
    plan = network.prepare(batch, device="cpu", dtype=torch.float32)
    rows = ds.rows_per_step(world)
    reach, density = window_reach(network.denoiser.patterns)
    facts = {
        "parameters": f"{total:,}, of which a token passes {active:,}",
        "step": f"{rows} rows of at most {run.data.row_tokens:,} tokens = {rows * run.data.row_tokens:,} tokens "
                f"({ds.micro_batch} rows x {ds.accumulation} micro-batches x {world} ranks)",
        "FLOPs": f"{training_flops(model, plan, batch.sample_C.numel()) / len(batch) / 1e6:,.1f} million a token, "
                 f"forward and backward, for the longest document: {len(batch):,} tokens with its noised copies",
        "reach": f"{reach[0]:,} tokens to the left and {reach[1]:,} to the right through the windows of {model.layers} "
                 f"layers, {density:.0%} of them" + _beyond_windows(run),
        "precision": f"{ds.precision}, ZeRO stage {ds.zero_stage}, clipping at {ds.clipping:g}",
        "log-SNR": "{:.2f} to {:.2f}".format(*model.log_snr_range()) if model.diffusion.schedule == "log_snr"
                   else f"schedule {model.diffusion.schedule}",
        **_kernels(model, device, dtype),
        **_expert_parallelism(run, ds, dtype),
    }
    memory, most = (memory_per_rank(run, ds, world, total, experts, share) for share in (None, 1.0))
    lines = [f"{name + ':':<14} {value}" for name, value in facts.items()]
    table = ["", f"memory of a rank of {world} (estimated; activations for full rows of the longest documents)",
             *(f"  {name:<24} {size / 2**30:9.3f} GiB" for name, size in memory.items()),
             f"  {'in all':<24} {sum(memory.values()) / 2**30:9.3f} GiB",
             f"  {'in all, at most':<24} {sum(most.values()) / 2**30:9.3f} GiB, where sources are so short that rows "
             "are nearly all target"]
    if device == "cpu":
        table.append("Freed memory is kept for speed, and leaves holes: a process may take half as much again. With "
                     "MALLOC_MMAP_THRESHOLD_=1048576 in the environment it goes back to the system instead.")
    return "\n".join([to_toml(run), *(f"{ds.path}: {notice}" for notice in ds.notices), *lines, *table])


def _kernels(model: ModelConfig, device: str, dtype: torch.dtype) -> dict[str, str]:
    """`chosen_kernels`, or why one that is asked for by name cannot run on this machine."""
    try:
        return chosen_kernels(model, device, dtype)
    except BackendUnavailable as error:
        return {"kernels": str(error)}


def _expert_parallelism(run: RunConfig, ds: DSConfig, dtype: torch.dtype) -> dict[str, str]:
    model, size = run.model, run.train.expert_parallel_size
    if size == 1:
        return {}
    rows = ds.micro_batch * ds.accumulation * run.data.row_tokens * model.moe.top_k * (size - 1) / size
    # There and back, forward and backward; layers under activation checkpointing go forward twice.
    ways = 4 + 2 * len(recomputed_layers(run.train.activation_checkpointing, model.layers)) / model.layers
    if model.diffusion.self_conditioning > 0:  # the first estimate, forward only
        ways += 2
    layers = model.layers - 1 + (target_share(run) if model.last_block_of == "target" else 1)
    sent = layers * rows * ways * model.width * dtype.itemsize
    return {"expert groups": f"{size} ranks hold {model.moe.experts // size} experts of each layer each; with evenly "
                             f"used experts a rank sends {sent / 1e6:,.1f} MB a step"}


def longest_document(run: RunConfig) -> PackedBatch:
    """One document of the greatest length that the configuration admits, with all its noised copies."""
    data = run.data
    room = data.row_tokens - data.draws_per_source * data.max_target_tokens
    source = np.full(min(room, data.max_source_tokens or room), run.model.eos_id + 1)
    canvas = np.full(data.max_target_tokens, run.model.eos_id + 1)
    strata = np.arange(data.draws_per_source)[None]
    return pack([Segment(source, canvas, len(canvas), 0)], np.zeros(1, np.int64), 1, strata, strata.size)


def window_reach(patterns: list[AttentionPattern]) -> tuple[tuple[int, int], float]:
    """((left, right), density): how far a token's information comes through the windows of all layers together, and
    which share of the tokens in between can reach it at all (dilation alone leaves gaps)."""
    def layer_offsets(pattern: AttentionPattern) -> tuple[int, set[int]]:
        left, right = pattern.window
        widest = max(pattern.dilations)
        return left * widest, {step * d for d in pattern.dilations for step in range(-left, right + 1)}

    # Bit i of a mask stands for the offset i - left; sums of offsets are shifted unions.
    def add(total: tuple[int, int], pattern: AttentionPattern) -> tuple[int, int]:
        left, mask = total
        margin, offsets = layer_offsets(pattern)
        return left + margin, reduce(lambda seen, offset: seen | mask << offset + margin, offsets, 0)

    left, mask = reduce(add, patterns, (0, 1))
    length = mask.bit_length()
    return (left, length - 1 - left), mask.bit_count() / length


def _beyond_windows(run: RunConfig) -> str:
    more = []
    if run.model.attention.global_tokens != "none":
        more.append("global tokens connect a whole document in two layers")
    if run.model.diffusion.conditioning == "cached":
        more.append("a target sees all of its source")
    return "".join(f"; {text}" for text in more)
