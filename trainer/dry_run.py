"""What would be trained, worked out without training it and without a GPU."""

from __future__ import annotations

from dataclasses import replace

import torch

from model.diffusion_lm import DiffusionLM
from trainer.config import RunConfig, to_toml
from trainer.ds_config import DSConfig
from trainer.kernels import DTYPES, chosen_kernels


def parameter_counts(run: RunConfig) -> tuple[int, int]:
    """(all parameters, those that one token passes): of each layer's experts a token passes top_k."""
    with torch.device("meta"):
        model = DiffusionLM(run.model)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for block in model.denoiser.blocks for p in block.moe.experts.parameters())
    return total, total - experts + experts * run.model.moe.top_k // run.model.moe.experts


def describe_run(run: RunConfig, ds: DSConfig, world: int) -> str:
    """The resolved configuration as text, then sizes and the kernels that would run on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ds.check_device(device)
    run = replace(run, model=replace(run.model, vocab_size=run.model.vocab_size or run.data.vocab_size))
    model = run.model
    total, active = parameter_counts(run)
    rows = ds.rows_per_step(world)
    facts = {
        "parameters": f"{total:,}, of which a token passes {active:,}",
        "step": f"{rows} rows of at most {run.data.row_tokens:,} tokens = {rows * run.data.row_tokens:,} tokens "
                f"({ds.micro_batch} rows x {ds.accumulation} micro-batches x {world} ranks)",
        "precision": f"{ds.precision}, ZeRO stage {ds.zero_stage}, clipping at {ds.clipping:g}",
        "log-SNR": "{:.2f} to {:.2f}".format(*model.log_snr_range()) if model.diffusion.schedule == "log_snr"
                   else f"schedule {model.diffusion.schedule}",
        **chosen_kernels(model, device, DTYPES[ds.precision]),
    }
    lines = [f"{name + ':':<14} {value}" for name, value in facts.items()]
    return "\n".join([to_toml(run), *(f"{ds.path}: {notice}" for notice in ds.notices), *lines])
