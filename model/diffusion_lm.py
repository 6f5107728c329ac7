"""The diffusion language model: token embeddings, partial noising, denoiser, prediction and loss.

The way of the data: tokens -> normalised embeddings -> noise on the target -> (context-free posterior) -> denoiser ->
distribution over the clean target tokens -> named loss terms. Equations: `docs/diffusion.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.batch import PackedBatch
from model.config import ModelConfig
from model.denoiser import Denoiser, SourceCache, StreamPlan
from model.diffusion.process import NoisyTargets, add_noise, context_free_logits
from model.diffusion.schedule import NoiseSchedule
from model.moe.layer import MoEAux


@dataclass(frozen=True)
class NoiseDraw:
    """All randomness of one training batch, drawn outside so that it can be keyed by sample (and tested).

    time_C: in [0, 1]. noise_NE: standard normal, uniform_N: in [0, 1), both for the N target tokens in packed order.
    guess_C: True where the copy is trained with a first estimate as second input; None without self-conditioning.
    jitter_LTD: uniform in [0, 1) for the routers' jitter; None without.
    """

    time_C: Tensor
    noise_NE: Tensor
    uniform_N: Tensor
    guess_C: Tensor | None = None
    jitter_LTD: Tensor | None = None

    def to(self, device: torch.device | str) -> NoiseDraw:
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in vars(self).items()
                                if value is not None})


@dataclass(frozen=True)
class BatchPlan:
    """Index tensors of a batch: the stream's plan, its target tokens, and which of those are in the loss."""

    stream: StreamPlan
    target_N: Tensor
    loss_of_target_M: Tensor

    def to(self, device: torch.device | str) -> BatchPlan:
        return BatchPlan(self.stream.to(device), self.target_N.to(device, non_blocking=True),
                         self.loss_of_target_M.to(device, non_blocking=True))


class LossReport(NamedTuple):
    """total: what is differentiated. terms: named sums over trained tokens (cross_entropy, mse, rounding) or over all
    tokens (balance, router_z). cross_entropy_M, log_snr_M: per trained token, for the breakdown by noise level;
    token_M: its place in the stream."""

    total: Tensor
    terms: dict[str, Tensor]
    cross_entropy_M: Tensor
    log_snr_M: Tensor
    token_M: Tensor
    experts: list[MoEAux]


class DiffusionLM(nn.Module):
    """Continuous diffusion over the embeddings of target tokens, conditioned on source tokens.

    Weights in any floating type; embeddings, noise and the output distribution are computed in fp32 at least.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        config.validate()
        self.config = config
        self.schedule = NoiseSchedule(config)
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.embed_dim))
        self.absorbing = nn.Parameter(torch.zeros(config.embed_dim))
        self.register_buffer("prior_count_V", torch.zeros(config.vocab_size, dtype=torch.int64))
        self.denoiser = Denoiser(config)
        self.predicts_tokens = config.diffusion.loss == "cross_entropy"
        self.head = nn.Linear(config.width, config.vocab_size if self.predicts_tokens else config.embed_dim)

    def init_weights(self, seed: int) -> None:
        """The same weights for the same seed, however the model is sharded. The head starts at zero: the first
        prediction is the context-free posterior (or, without that skip, uniform)."""
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.embedding, generator=generator)
        nn.init.zeros_(self.absorbing)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.denoiser.init_weights(seed)

    def log_prior(self) -> Tensor:
        """Unigram prior [V] in fp32, from how often each token stands on the canvas of the training targets (filler
        included). One is added to every count, so that no token is impossible. Kept as counts: whole numbers stay
        exact when the model is cast to bf16."""
        smoothed_V = self.prior_count_V.double() + 1
        return (smoothed_V / smoothed_V.sum()).log().float()

    def rows(self) -> Tensor:
        """Embedding table [V, E], fp32 at least: rows of length sqrt(E), shifted by the absorbing vector."""
        wide = torch.promote_types(self.embedding.dtype, torch.float32)
        table_VE = nn.functional.normalize(self.embedding.to(wide), dim=-1) * self.config.embed_dim ** 0.5
        return table_VE - self.absorbing.to(wide)

    def prepare(self, batch: PackedBatch, *, device: torch.device | str, dtype: torch.dtype) -> BatchPlan:
        """Works out a batch's indices on the CPU, once for all layers and steps."""
        stream = self.denoiser.prepare(
            batch.tokens_T, batch.document_T, batch.position_T, batch.is_target_T, batch.draw_T, batch.copy_T,
            batch.sample_C.numel(), batch.row_T, batch.rows, device=device, dtype=dtype)
        target_N = batch.is_target_T.nonzero().flatten()
        return BatchPlan(stream, target_N, batch.in_loss_T[target_N].nonzero().flatten())

    def forward(self, batch: PackedBatch, plan: BatchPlan, draw: NoiseDraw, loss_tokens: float,
                tokens: float) -> LossReport:
        """One micro-batch's share of the global batch's loss.

        loss_tokens, tokens: how many trained tokens and tokens in all the global batch has, so that the shares of all
        micro-batches and ranks add up to the loss of the whole, however it is divided.
        """
        rows_VE = self.rows()
        log_snr_C, clean_NE, noisy = self._noised(batch, plan, draw, rows_VE)
        prior_NV = self._prior(noisy, rows_VE)

        guess_NE = None
        if draw.guess_C is not None:
            with torch.no_grad():
                first, _, _ = self._predict(batch, plan, noisy, log_snr_C, rows_VE, prior_NV,
                                            torch.zeros_like(clean_NE), draw.jitter_LTD)
                kept_N1 = draw.guess_C[batch.copy_T[plan.target_N]][:, None]
                guess_NE = self.estimate(first, rows_VE) * kept_N1
        output, _, experts = self._predict(batch, plan, noisy, log_snr_C, rows_VE, prior_NV, guess_NE,
                                           draw.jitter_LTD, at_N=plan.loss_of_target_M)

        token_M = plan.target_N[plan.loss_of_target_M]
        answer_M = batch.tokens_T[token_M]
        cross_entropy_M = nn.functional.cross_entropy(self.logits(output, rows_VE), answer_M, reduction="none")
        terms = {"cross_entropy": cross_entropy_M.sum()}
        if self.predicts_tokens:
            per_token = terms["cross_entropy"]
        else:
            clean_ME = clean_NE[plan.loss_of_target_M]
            terms["mse"] = (output - clean_ME).square().mean(-1).sum()
            terms["rounding"] = nn.functional.cross_entropy(self.logits(clean_ME, rows_VE), answer_M, reduction="sum")
            per_token = terms["mse"] + terms["rounding"]
        terms["balance"] = sum(aux.balance_sum for aux in experts) / len(experts)
        terms["router_z"] = sum(aux.z_sum for aux in experts) / len(experts)
        moe = self.config.moe
        total = per_token / loss_tokens + (moe.balance_weight * terms["balance"]
                                           + moe.z_weight * terms["router_z"]) / tokens
        return LossReport(total, {name: term.detach() for name, term in terms.items()}, cross_entropy_M.detach(),
                          noisy.log_snr_T[plan.loss_of_target_M], token_M, experts)

    def context_free_cross_entropy(self, batch: PackedBatch, plan: BatchPlan, draw: NoiseDraw) -> Tensor:
        """Cross-entropy [M] of the trained tokens under the context-free posterior: the best that can be said of a
        token from its own noisy embedding and the unigram prior. A model that is not below it uses no context."""
        rows_VE = self.rows()
        _, _, noisy = self._noised(batch, plan, draw, rows_VE)
        logits_NV = self._without_filler(context_free_logits(noisy, rows_VE, self.log_prior()))
        answer_M = batch.tokens_T[plan.target_N[plan.loss_of_target_M]]
        return nn.functional.cross_entropy(logits_NV[plan.loss_of_target_M], answer_M, reduction="none")

    def _noised(self, batch: PackedBatch, plan: BatchPlan, draw: NoiseDraw,
                rows_VE: Tensor) -> tuple[Tensor, Tensor, NoisyTargets]:
        """Noise level of each copy [C], clean embeddings [N, E] of the targets, and the targets noised."""
        clean_NE = rows_VE[batch.tokens_T[plan.target_N]]
        log_snr_C = self.schedule.log_snr(draw.time_C)
        noisy = add_noise(clean_NE, log_snr_C[batch.copy_T[plan.target_N]], draw.noise_NE, draw.uniform_N,
                          self.config.diffusion.absorbing)
        return log_snr_C, clean_NE, noisy

    def _prior(self, noisy: NoisyTargets, rows_VE: Tensor) -> Tensor | None:
        """Context-free posterior logits, which the input and the skip share; None where neither wants them."""
        if self.config.input != "bayes" and not self.config.bayes_skip:
            return None
        return context_free_logits(noisy, rows_VE, self.log_prior())

    def _predict(self, batch: PackedBatch, plan: BatchPlan, noisy: NoisyTargets, log_snr_C: Tensor, rows_VE: Tensor,
                 prior_NV: Tensor | None, guess_NE: Tensor | None, jitter_LTD: Tensor | None,
                 at_N: Tensor | None = None) -> tuple[Tensor, SourceCache, list[MoEAux]]:
        """Runs sources and noisy targets together; the prediction is for the targets listed in at_N (all if None)."""
        inputs_TE = rows_VE[batch.tokens_T].index_copy(0, plan.target_N, self._inputs(noisy, rows_VE, prior_NV))
        if self.config.diffusion.self_conditioning > 0:
            previous_TE = torch.zeros_like(inputs_TE)
            if guess_NE is not None:
                previous_TE = previous_TE.index_copy(0, plan.target_N, guess_NE)
            inputs_TE = torch.cat((inputs_TE, previous_TE), dim=-1)
        hidden_TD, cache, experts = self.denoiser(inputs_TE, log_snr_C, plan.stream, jitter_LTD=jitter_LTD)
        at = plan.target_N if at_N is None else plan.target_N[at_N]
        prior = prior_NV if at_N is None or prior_NV is None else prior_NV[at_N]
        return self._output(hidden_TD[at], prior), cache, experts

    def _inputs(self, noisy: NoisyTargets, rows_VE: Tensor, prior_NV: Tensor | None) -> Tensor:
        """What the network is fed for noisy targets [N, E]; both choices have variance near one."""
        return prior_NV.softmax(-1) @ rows_VE if self.config.input == "bayes" else noisy.z_TE

    def _output(self, hidden_ND: Tensor, prior_NV: Tensor | None) -> Tensor:
        """Logits [N, V] over clean tokens (loss = cross_entropy), or the predicted clean embedding [N, E] (mse)."""
        output = self.head(hidden_ND)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        return output + prior_NV if self.config.bayes_skip else output

    def logits(self, output: Tensor, rows_VE: Tensor) -> Tensor:
        """Token logits [N, V] of a prediction. The filler is never predicted: where a text has ended, its end token
        says so."""
        return self._without_filler(output if self.predicts_tokens else output @ rows_VE.T)

    def _without_filler(self, logits_NV: Tensor) -> Tensor:
        is_filler_V = torch.arange(self.config.vocab_size, device=logits_NV.device) == self.config.pad_id
        return logits_NV.masked_fill(is_filler_V, -torch.inf)

    def estimate(self, output: Tensor, rows_VE: Tensor) -> Tensor:
        """Expected clean embedding [N, E] of a prediction."""
        return self.logits(output, rows_VE).softmax(-1) @ rows_VE if self.predicts_tokens else output

    def encode_sources(self, batch: PackedBatch, plan: StreamPlan) -> SourceCache:
        """Keys and values of source tokens, once for all steps; only in cached conditioning."""
        rows_VE = self.rows()
        inputs_TE = rows_VE[batch.tokens_T]
        if self.config.diffusion.self_conditioning > 0:
            inputs_TE = torch.cat((inputs_TE, torch.zeros_like(inputs_TE)), dim=-1)
        log_snr_C = torch.zeros(batch.sample_C.numel(), device=inputs_TE.device)
        return self.denoiser(inputs_TE, log_snr_C, plan)[1]

    def predict_targets(self, noisy: NoisyTargets, guess_NE: Tensor, log_snr_C: Tensor, plan: StreamPlan,
                        cache: SourceCache | None) -> tuple[Tensor, Tensor]:
        """One sampling step against cached sources: (prediction for every target token, embedding rows)."""
        rows_VE = self.rows()
        prior_NV = self._prior(noisy, rows_VE)
        inputs_NE = self._inputs(noisy, rows_VE, prior_NV)
        if self.config.diffusion.self_conditioning > 0:
            inputs_NE = torch.cat((inputs_NE, guess_NE), dim=-1)
        hidden_ND = self.denoiser(inputs_NE, log_snr_C, plan, source_cache=cache)[0]
        return self._output(hidden_ND, prior_NV), rows_VE

    def predict_packed(self, batch: PackedBatch, plan: BatchPlan, noisy: NoisyTargets, guess_NE: Tensor,
                       log_snr_C: Tensor) -> tuple[Tensor, Tensor]:
        """One sampling step that computes sources and targets together (joint conditioning)."""
        rows_VE = self.rows()
        prior_NV = self._prior(noisy, rows_VE)
        return self._predict(batch, plan, noisy, log_snr_C, rows_VE, prior_NV, guess_NE, None)[0], rows_VE
