"""How well models predict at noise levels that are equally hard, whatever their embeddings.

Embeddings of different widths and lengths are hidden by different amounts of noise, so that cross-entropies of two
recipes at one log-SNR do not compare. Here a level is named by how many tokens can be told from their own noisy
embedding alone: the accuracy of the context-free Bayes posterior. A model's predictions are then judged where that is
15, 25, 40 and 60 %.

Letters: M tokens of text of all targets (their end tokens included), V tokens of the vocabulary, E the width of the
embeddings, B temperatures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.batch import PackedBatch
from model.diffusion.process import add_noise, context_free_logits
from model.diffusion_lm import BatchPlan, DiffusionLM, NoiseDraw
from trainer.data.evaluation import evaluation_batches
from trainer.data.packing import Samples
from trainer.randomness import evaluation_draw

ACCURACIES = (0.15, 0.25, 0.4, 0.6)
MATCHED = ("cross_entropy", "token_accuracy", "embedding_error")
"""What is measured at them."""
_TOKENS = 4096
"""Enough to find a level by."""
_SHARPNESS = 2.0 ** torch.arange(-6, 3.5, 0.5)
"""Inverse temperatures that are tried."""


class _Part(NamedTuple):
    batch: PackedBatch
    plan: BatchPlan
    draw: NoiseDraw


@torch.no_grad()
def matched_levels(model: DiffusionLM, samples: Samples, documents: int, seed: int) -> dict[str, list]:
    """For every one of ACCURACIES, of `documents` of the samples, as lists:

    log_snr: where it is reached, None (as in the lists below) where even the noisiest level of the model leaves more
    known, or its cleanest less; token_accuracy: of the model's most likely tokens; cross_entropy: nats per token at the
    one temperature that suits the model best, so that models whose logits were not trained as probabilities are judged
    as well; embedding_error: squared distance of the predicted to the true embedding, by the mean squared distance of
    true embeddings from their mean. Filler is ruled out for all.
    """
    parts = [_prepared(model, batch, seed) for batch, _ in evaluation_batches(samples, limit=documents)]
    known = _ContextFree(model, parts)
    found: dict[str, list] = {name: [] for name in ("log_snr", *MATCHED)}
    for accuracy in ACCURACIES:
        time = known.time_of(accuracy)
        measured = {} if time is None else _at(model, parts, time, known.variance)
        for name, values in found.items():
            values.append(measured.get(name))
    return found


def _prepared(model: DiffusionLM, batch: PackedBatch, seed: int) -> _Part:
    plan = model.prepare(batch, device="cpu", dtype=model.embedding.dtype)
    return _Part(batch, plan, evaluation_draw(batch, model.config, torch.zeros(batch.sample_C.numel()), seed))


class _ContextFree:
    """Tokens of text with fixed noise, and how many of them their noisy embeddings give away."""

    def __init__(self, model: DiffusionLM, parts: list[_Part]):
        at = [part.plan.loss_of_target_M for part in parts]
        every = max(1, sum(map(len, at)) // _TOKENS)
        self.model, self.rows_VE = model, model.rows()
        self.answer_M, self.noise_ME, self.uniform_M = (torch.cat(values)[::every] for values in (
            [part.batch.tokens_T[part.plan.target_N[at_M]] for part, at_M in zip(parts, at, strict=True)],
            [part.draw.noise_NE[at_M] for part, at_M in zip(parts, at, strict=True)],
            [part.draw.uniform_N[at_M] for part, at_M in zip(parts, at, strict=True)]))
        self.clean_ME = self.rows_VE[self.answer_M]
        self.variance = float((self.clean_ME - self.clean_ME.mean(0)).square().sum(-1).mean())

    def accuracy(self, time: float) -> float:
        model = self.model
        log_snr_M = model.schedule.log_snr(torch.tensor(time)).expand(len(self.answer_M))
        noisy = add_noise(self.clean_ME, log_snr_M, self.noise_ME, self.uniform_M, model.config.diffusion.absorbing)
        logits_MV = context_free_logits(noisy, self.rows_VE, model.log_prior())
        return float((_of_text(model, logits_MV).argmax(-1) == self.answer_M).float().mean())

    def time_of(self, accuracy: float) -> float | None:
        """The time at which the accuracy is reached, by bisection: with fixed noise it falls with time."""
        clean, noisy = 0.0, 1.0
        if not self.accuracy(noisy) <= accuracy <= self.accuracy(clean):
            return None
        for _ in range(24):
            middle = (clean + noisy) / 2
            clean, noisy = (clean, middle) if self.accuracy(middle) < accuracy else (middle, noisy)
        return (clean + noisy) / 2


def _at(model: DiffusionLM, parts: list[_Part], time: float, variance: float) -> dict[str, float]:
    """The model's predictions of all tokens at one time."""
    hits = error = count = 0.0
    entropy_B = torch.zeros(len(_SHARPNESS), dtype=torch.float64)
    for batch, plan, draw in parts:
        output, rows_VE = _prediction(model, batch, plan, draw, time)
        output, at_M = output[plan.loss_of_target_M], plan.target_N[plan.loss_of_target_M]
        logits_MV, answer_M = _of_text(model, model.logits(output, rows_VE)), batch.tokens_T[at_M]
        hits += float((logits_MV.argmax(-1) == answer_M).sum())
        count += len(answer_M)
        entropy_B += torch.stack([torch.nn.functional.cross_entropy(sharpness * logits_MV, answer_M, reduction="sum")
                                  for sharpness in _SHARPNESS])
        error += float((model.estimate(output, rows_VE) - rows_VE[answer_M]).square().sum())
    return {"log_snr": float(model.schedule.log_snr(torch.tensor(time))), "token_accuracy": hits / count,
            "cross_entropy": float(entropy_B.min()) / count, "embedding_error": error / count / variance}


def _prediction(model: DiffusionLM, batch: PackedBatch, plan: BatchPlan, draw: NoiseDraw,
                time: float) -> tuple[Tensor, Tensor]:
    """(prediction for every target token, embedding rows), with a first estimate as second input where the model was
    trained with one."""
    log_snr_C = model.schedule.log_snr(torch.full((batch.sample_C.numel(),), time))
    clean_NE = model.rows()[batch.tokens_T[plan.target_N]]
    noisy = add_noise(clean_NE, log_snr_C[batch.copy_T[plan.target_N]], draw.noise_NE, draw.uniform_N,
                      model.config.diffusion.absorbing)
    output, rows_VE = model.predict_packed(batch, plan, noisy, torch.zeros_like(clean_NE), log_snr_C)
    if model.config.diffusion.self_conditioning > 0:
        guess_NE = model.estimate(output, rows_VE)
        output, rows_VE = model.predict_packed(batch, plan, noisy, guess_NE, log_snr_C)
    return output, rows_VE


def _of_text(model: DiffusionLM, logits_MV: Tensor) -> Tensor:
    """Without the filler, which some recipes train on and others rule out."""
    is_filler_V = torch.arange(model.config.vocab_size) == model.config.pad_id
    return logits_MV.masked_fill(is_filler_V, -torch.inf)
