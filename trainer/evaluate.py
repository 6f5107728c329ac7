"""Evaluation: cross-entropy at fixed noise levels, beside what is known without context and with wrong sources."""

from __future__ import annotations

from collections.abc import Callable

import torch

from model.batch import PackedBatch
from model.diffusion_lm import DiffusionLM
from trainer.data.evaluation import evaluation_batches
from trainer.data.prepare import PreparedData
from trainer.launch import Ranks
from trainer.randomness import evaluation_draw

_TITLES = {"model": "model", "shuffled_sources": "wrong source", "context_free": "context-free"}
_SYSTEMS = tuple(_TITLES)
KNOWN_BELOW = 0.5
"""nats: noise levels where the context-free posterior knows a token better than this are left out of the averages;
there is nothing left to learn from context."""


@torch.no_grad()
def evaluate(model: DiffusionLM, data: PreparedData, split: str, *, documents: int, levels: int, seed: int,
             dtype: torch.dtype, ranks: Ranks, between: Callable[[], None] = lambda: None) -> dict:
    """Cross-entropy in nats per token of `documents` of a split, at the middles of `levels` equal slices of time.

    `model`: with the right sources; `shuffled_sources`: each target with another document's source, the same noise
    (left out where documents have no source); `context_free`: the Bayes posterior from the unigram prior and a
    token's own noisy embedding. Averages are over the levels where the last exceeds KNOWN_BELOW, the noisiest among
    them. A collective: all ranks call it. between: called before every batch, equally often on all ranks; may raise
    to abandon the evaluation.
    """
    times = (torch.arange(levels) + 0.5) / levels
    # Cached sources are computed once for all levels, as draws of one document; otherwise a pass for every level.
    passes = [times] if model.config.diffusion.conditioning == "cached" else list(times.split(1))
    samples = data.samples(split, draws=len(passes[0]))
    orders = (False, True) if samples.cache.paired and min(documents, len(samples)) > 1 else (False,)
    sums = torch.zeros(levels, len(_SYSTEMS) + 1, dtype=torch.float64, device=ranks.device)
    for first, level_times in zip(range(0, levels, len(passes[0])), passes, strict=True):
        for shuffled in orders:
            for batch, weight in evaluation_batches(samples, limit=documents, rank=ranks.rank, world=ranks.world,
                                                    shuffle_sources=shuffled):
                between()
                _add(sums, model, batch, weight, level_times, first, seed, shuffled, dtype, ranks.device)
    torch.distributed.all_reduce(sums)
    *totals, counts = sums.cpu().unbind(1)
    by_level = {name: (total / counts).tolist() for name, total in zip(_SYSTEMS, totals, strict=True)
                if name != "shuffled_sources" or len(orders) == 2}
    hard = [index for index, value in enumerate(by_level["context_free"]) if value > KNOWN_BELOW]
    result = {f"cross_entropy_{name}": sum(values[i] for i in hard) / max(1, len(hard))
              for name, values in by_level.items()}
    return {**result, "levels_averaged": len(hard), "tokens": int(counts[0]),
            "log_snr": model.schedule.log_snr(times).tolist(), "by_level": by_level}


def _add(sums: torch.Tensor, model: DiffusionLM, batch: PackedBatch, weight: float, times: torch.Tensor, first: int,
         seed: int, shuffled: bool, dtype: torch.dtype, device: torch.device) -> None:
    plan = model.prepare(batch, device=device, dtype=dtype).to(device)
    draw = evaluation_draw(batch, model.config, times[batch.draw_C], seed + first).to(device)
    batch = batch.to(device)
    report = model(batch, plan, draw, 1.0, 1.0, 1.0)
    level_M = first + batch.draw_C[batch.copy_T[plan.target_N[plan.loss_of_target_M]]]
    sums[:, 1 if shuffled else 0].index_add_(0, level_M, weight * report.cross_entropy_M.double())
    if not shuffled:
        free_M = model.context_free_cross_entropy(batch, plan, draw)
        sums[:, 2].index_add_(0, level_M, weight * free_M.double())
        sums[:, 3].index_add_(0, level_M, torch.full_like(free_M, weight, dtype=torch.float64))


def summary(result: dict) -> str:
    """The averages in one line."""
    parts = [f"{_TITLES[name]} {result[f'cross_entropy_{name}']:.3f}" for name in result["by_level"]]
    return f"cross-entropy in nats per token: {', '.join(parts)}"


def table(result: dict) -> str:
    """The result for people: one line a noise level, then the averages."""
    names = list(result["by_level"])
    lines = [f"{'log-SNR':>8}" + "".join(f"{_TITLES[name]:>14}" for name in names) + "   nats per token"]
    for index, log_snr in enumerate(result["log_snr"]):
        lines.append(f"{log_snr:8.2f}" + "".join(f"{result['by_level'][name][index]:14.3f}" for name in names))
    lines.append(f"{'mean':>8}" + "".join(f"{result[f'cross_entropy_{name}']:14.3f}" for name in names)
                 + f"   over the {result['levels_averaged']} levels where context-free > {KNOWN_BELOW}")
    return "\n".join(lines)
