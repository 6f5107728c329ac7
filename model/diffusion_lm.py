"""The diffusion language model: token embeddings, partial noising, denoiser, prediction and loss.

The way of the data: tokens -> embeddings -> noise on the target -> (context-free posterior) -> denoiser ->
distribution over the clean target tokens -> named loss terms. Equations: `docs/diffusion.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.batch import PackedBatch
from model.bert_denoiser import BertDenoiser, down_projection, init_linears
from model.config import ModelConfig
from model.denoiser import Denoiser, SourceCache, StreamPlan
from model.diffusion.process import NoisyTargets, add_noise, context_free_logits
from model.diffusion.schedule import NoiseSchedule, alpha_sigma
from model.moe.layer import MoEAux
from model.table_cross_entropy import table_cross_entropy
from model.transfer import sent


@dataclass(frozen=True)
class NoiseDraw:
    """All randomness of one training batch, drawn outside so that it can be keyed by sample (and tested).

    time_C: in [0, 1]. weight_C: importance weights of the copies' losses; None where times are drawn evenly.
    noise_NE: standard normal, uniform_N: in [0, 1), both for the N target tokens in packed order.
    embedding_noise_TE: standard normal, for all tokens; None where embeddings are not noised themselves.
    guess_C: True where the copy is trained with a first estimate as second input; None without self-conditioning.
    jitter_T, dropout_T: int64 keys of the routers' jitter and of what is dropped; None without.
    """

    time_C: Tensor
    noise_NE: Tensor
    uniform_N: Tensor
    guess_C: Tensor | None = None
    jitter_T: Tensor | None = None
    weight_C: Tensor | None = None
    embedding_noise_TE: Tensor | None = None
    dropout_T: Tensor | None = None

    def for_network(self) -> dict[str, Tensor]:
        """What the network itself draws, by the name of its argument."""
        draws = {"jitter_T": self.jitter_T, "dropout_T": self.dropout_T}
        return {name: value for name, value in draws.items() if value is not None}

    def to(self, device: torch.device | str) -> NoiseDraw:
        return replace(self, **{name: sent(value, device) for name, value in vars(self).items() if value is not None})


@dataclass(frozen=True)
class BatchPlan:
    """Index tensors of a batch.

    stream: the network's plan. target_N: the target tokens. loss_of_target_M: which of those are text or its end.
    scored_S: the tokens whose predictions are in the loss. state_N, state_S: where the target and the scored tokens
    stand in what the network returns. judged_J: which of the scored ones are targets, whose cross-entropy is taken.
    text_of_judged_M: which of those are text or its end. fraction_S, fraction_J: the part that a token is of its
    copy's scored, or judged, tokens.
    """

    stream: StreamPlan
    target_N: Tensor
    loss_of_target_M: Tensor
    scored_S: Tensor
    state_N: Tensor
    state_S: Tensor
    judged_J: Tensor
    text_of_judged_M: Tensor
    fraction_S: Tensor
    fraction_J: Tensor

    def to(self, device: torch.device | str) -> BatchPlan:
        moved = {name: sent(value, device) for name, value in vars(self).items() if name != "stream"}
        return BatchPlan(stream=self.stream.to(device), **moved)


class LossReport(NamedTuple):
    """total: what is differentiated. terms: this micro-batch's share of every named term's mean over the global batch,
    without weights. loss_C: the loss of each noised copy by itself. cross_entropy_M, log_snr_M: per token of text, for
    the breakdown by noise level; token_M: its place in the stream. last_N: the tokens that pass the last layer of
    experts, None for all; last_M: the place of the tokens of text among them."""

    total: Tensor
    terms: dict[str, Tensor]
    loss_C: Tensor
    cross_entropy_M: Tensor
    log_snr_M: Tensor
    token_M: Tensor
    experts: list[MoEAux]
    last_N: Tensor | None
    last_M: Tensor


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
        self.absorbing = nn.Parameter(torch.zeros(config.embed_dim)) if config.diffusion.absorbing > 0 else None
        self.register_buffer("prior_count_V", torch.zeros(config.vocab_size, dtype=torch.int64))
        self.predicts_tokens = config.diffusion.loss == "cross_entropy"
        if config.network == "bert":
            self.denoiser, self.head = BertDenoiser(config), down_projection(config)
            self.token_bias = nn.Parameter(torch.zeros(config.vocab_size))
        else:
            self.denoiser = Denoiser(config)
            self.head = nn.Linear(config.width, config.vocab_size if self.predicts_tokens else config.embed_dim)
            self.token_bias = None

    def init_weights(self, seed: int) -> None:
        """The same weights for the same seed, however the model is sharded. The head starts at zero: the first
        prediction is the context-free posterior (or, without that skip, uniform). DiffuSeq's network starts as it did
        there, where the bias of its tied output is a linear layer's too."""
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.embedding, generator=generator)
        if self.config.network == "bert":
            self.denoiser.init_weights(generator)
            init_linears(self.head, generator)
            bound = self.config.embed_dim ** -0.5
            nn.init.uniform_(self.token_bias, -bound, bound, generator=generator)
            if self.absorbing is not None:
                nn.init.normal_(self.absorbing, std=bound, generator=generator)
            return
        if self.absorbing is not None:
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
        """Embedding table [V, E], fp32 at least: rows of length sqrt(E) where they are normalised, shifted by the
        absorbing vector."""
        table_VE = self.embedding.to(torch.promote_types(self.embedding.dtype, torch.float32))
        if self.config.normalize_embeddings:
            table_VE = nn.functional.normalize(table_VE, dim=-1) * self.config.embed_dim ** 0.5
        return table_VE if self.absorbing is None else table_VE - self.absorbing.to(table_VE.dtype)

    def unshifted(self, x: Tensor) -> Tensor:
        """From the shifted coordinates, in which noise is added, to those of the embedding table."""
        return x if self.absorbing is None else x + self.absorbing.to(x.dtype)

    def prepare(self, batch: PackedBatch, *, device: torch.device | str, dtype: torch.dtype) -> BatchPlan:
        """Works out a batch's indices on the CPU, once for all layers and steps."""
        stream = self.denoiser.prepare(
            batch.tokens_T, batch.document_T, batch.position_T, batch.is_target_T, batch.draw_T, batch.copy_T,
            batch.sample_C.numel(), batch.row_T, batch.rows, device=device, dtype=dtype,
            last=self.config.last_block_of)
        target_N = batch.is_target_T.nonzero().flatten()
        scope = self.config.diffusion.loss_over
        is_scored_T = {"text": batch.in_loss_T, "canvas": batch.is_target_T,
                       "document": torch.ones_like(batch.is_target_T)}[scope]
        scored_S = is_scored_T.nonzero().flatten()
        judged_J = batch.is_target_T[scored_S].nonzero().flatten()

        def fraction(at: Tensor) -> Tensor:
            copy = batch.copy_T[at]
            return 1 / torch.bincount(copy)[copy]

        place_T = torch.arange(len(batch))
        if stream.last_N is not None:
            place_T[stream.last_N] = torch.arange(len(stream.last_N))
        return BatchPlan(stream, target_N, loss_of_target_M=batch.in_loss_T[target_N].nonzero().flatten(),
                         scored_S=scored_S, state_N=place_T[target_N], state_S=place_T[scored_S], judged_J=judged_J,
                         text_of_judged_M=batch.in_loss_T[scored_S[judged_J]].nonzero().flatten(),
                         fraction_S=fraction(scored_S), fraction_J=fraction(scored_S[judged_J]))

    def forward(self, batch: PackedBatch, plan: BatchPlan, draw: NoiseDraw, loss_tokens: float, tokens: float,
                target_tokens: float) -> LossReport:
        """One micro-batch's share of the global batch's loss.

        loss_tokens, tokens, target_tokens: how many trained tokens, tokens in all and tokens on canvases the global
        batch has, so that the shares of all micro-batches and ranks add up to the loss of the whole, however it is
        divided.
        """
        rows_VE = self.rows()
        log_snr_C, clean_TE, noisy = self._noised(batch, plan, draw, rows_VE)
        prior_NV = self._prior(noisy, rows_VE)

        guess_NE = None
        if draw.guess_C is not None:
            with torch.no_grad():
                first, _, _ = self._predict(plan, clean_TE, noisy, log_snr_C, rows_VE, prior_NV,
                                            torch.zeros_like(noisy.z_TE), draw)
                kept_N1 = draw.guess_C[batch.copy_T[plan.target_N]][:, None]
                guess_NE = self.estimate(first, rows_VE) * kept_N1
        output_S, _, experts = self._predict(plan, clean_TE, noisy, log_snr_C, rows_VE, prior_NV, guess_NE, draw,
                                             scored=True)

        d, moe = self.config.diffusion, self.config.moe
        by_token = d.loss_over == "text"
        share_S = torch.full_like(plan.fraction_S, 1 / loss_tokens) if by_token else plan.fraction_S / batch.strata
        share_J = torch.full_like(plan.fraction_J, 1 / loss_tokens) if by_token else plan.fraction_J / batch.strata
        copy_S = batch.copy_T[plan.scored_S]

        answer_J = batch.tokens_T[plan.scored_S[plan.judged_J]]
        judged = output_S if self.predicts_tokens else output_S[plan.judged_J]
        with torch.set_grad_enabled(self.predicts_tokens and torch.is_grad_enabled()):  # or it is only watched
            cross_entropy_J = nn.functional.cross_entropy(self.logits(judged, rows_VE), answer_J, reduction="none")
        terms = {"cross_entropy": (share_J * cross_entropy_J).sum()}
        if self.predicts_tokens:
            loss_S = cross_entropy_J
        else:
            parts = self._embedding_terms(batch, plan, draw, rows_VE, clean_TE, output_S)
            terms |= {name: (share_S * value_S).sum() for name, value_S in parts.items()}
            loss_S = sum(parts.values())
        weight_S = share_S if draw.weight_C is None else share_S * draw.weight_C[copy_S]
        total = (weight_S * loss_S).sum()
        loss_C = torch.zeros(batch.sample_C.numel(), dtype=loss_S.dtype, device=loss_S.device)
        loss_C = loss_C.index_add(0, copy_S, (plan.fraction_S * loss_S).detach())
        if d.absorbing_norm > 0:
            length = self.absorbing.to(rows_VE.dtype).norm()
            terms["absorbing_norm"] = length * share_S.sum()
            total = total + d.absorbing_norm * length * weight_S.sum()
            loss_C = loss_C + d.absorbing_norm * length.detach()
        if experts:
            routed = tokens * (len(experts) - 1) + (tokens if plan.stream.last_N is None else target_tokens)
            terms["balance"] = sum(aux.balance_sum for aux in experts) / routed
            terms["router_z"] = sum(aux.z_sum for aux in experts) / routed
            total = total + moe.balance_weight * terms["balance"] + moe.z_weight * terms["router_z"]
        token_M, last_N = plan.target_N[plan.loss_of_target_M], plan.stream.last_N
        return LossReport(total, {name: term.detach() for name, term in terms.items()}, loss_C,
                          cross_entropy_J.detach()[plan.text_of_judged_M], noisy.log_snr_T[plan.loss_of_target_M],
                          token_M, experts, last_N, token_M if last_N is None else plan.loss_of_target_M)

    def _embedding_terms(self, batch: PackedBatch, plan: BatchPlan, draw: NoiseDraw, rows_VE: Tensor,
                         clean_TE: Tensor, output_SE: Tensor) -> dict[str, Tensor]:
        """The parts [S] of the loss where embeddings are predicted, for every scored token."""
        d = self.config.diffusion
        answer_S, clean_SE = batch.tokens_T[plan.scored_S], clean_TE[plan.scored_S]
        goal_SE = clean_SE
        if d.embedding_noise:  # at the first step the goal is the embedding itself
            first_S1 = (self.schedule.step(draw.time_C) == 0)[batch.copy_T[plan.scored_S]][:, None]
            goal_SE = torch.where(first_S1, rows_VE[answer_S], clean_SE)
        parts = {"mse": (output_SE - goal_SE).square().mean(-1),
                 "rounding": table_cross_entropy(*self._against_table(clean_SE, rows_VE), answer_S)}
        if d.terminal_loss:
            left = alpha_sigma(torch.tensor(self.schedule.low, dtype=torch.float64))[0].item()
            parts["terminal"] = (left * self.unshifted(clean_SE)).square().mean(-1)
        return parts

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
        """Noise level of each copy [C], embeddings [T, E] of all tokens before noising, and the targets noised."""
        clean_TE = nn.functional.embedding(batch.tokens_T, rows_VE)
        if draw.embedding_noise_TE is not None:
            first = torch.tensor(self.schedule.high, dtype=torch.float64)
            clean_TE = clean_TE + alpha_sigma(first)[1].item() * draw.embedding_noise_TE
        log_snr_C = self.schedule.log_snr(draw.time_C)
        noisy = add_noise(clean_TE[plan.target_N], log_snr_C[batch.copy_T[plan.target_N]], draw.noise_NE,
                          draw.uniform_N, self.config.diffusion.absorbing)
        return log_snr_C, clean_TE, noisy

    def _prior(self, noisy: NoisyTargets, rows_VE: Tensor) -> Tensor | None:
        """Context-free posterior logits, which the input and the skip share; None where neither wants them."""
        if self.config.input != "bayes" and not self.config.bayes_skip:
            return None
        return context_free_logits(noisy, rows_VE, self.log_prior())

    def _predict(self, plan: BatchPlan, clean_TE: Tensor, noisy: NoisyTargets, log_snr_C: Tensor, rows_VE: Tensor,
                 prior_NV: Tensor | None, guess_NE: Tensor | None, draw: NoiseDraw | None,
                 scored: bool = False) -> tuple[Tensor, SourceCache, list[MoEAux]]:
        """Runs sources and noisy targets together; the prediction is for all targets, or for the scored tokens."""
        inputs_TE = clean_TE.index_copy(0, plan.target_N, self._inputs(noisy, rows_VE, prior_NV))
        if self.config.diffusion.self_conditioning > 0:
            previous_TE = torch.zeros_like(inputs_TE)
            if guess_NE is not None:
                previous_TE = previous_TE.index_copy(0, plan.target_N, guess_NE)
            inputs_TE = torch.cat((inputs_TE, previous_TE), dim=-1)
        if self.config.network == "bert":
            inputs_TE = self.unshifted(inputs_TE)
        hidden_TD, cache, experts = self.denoiser(inputs_TE, log_snr_C, plan.stream,
                                                  **({} if draw is None else draw.for_network()))
        prior = prior_NV
        if scored and self.config.bayes_skip and self.config.diffusion.loss_over == "text":
            prior = prior_NV.index_select(0, plan.loss_of_target_M)
        return self._output(hidden_TD.index_select(0, plan.state_S if scored else plan.state_N), prior), cache, experts

    def _inputs(self, noisy: NoisyTargets, rows_VE: Tensor, prior_NV: Tensor | None) -> Tensor:
        """What the network is fed for noisy targets [N, E]; both choices have variance near one."""
        return prior_NV.softmax(-1) @ rows_VE if self.config.input == "bayes" else noisy.z_TE

    def _output(self, hidden_ND: Tensor, prior_NV: Tensor | None) -> Tensor:
        """Logits [N, V] over clean tokens (loss = cross_entropy), or the predicted clean embedding [N, E] (mse)."""
        output = self.head(hidden_ND)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.config.network == "bert" and self.absorbing is not None:
            return output - self.absorbing.to(output.dtype)
        return output + prior_NV if self.config.bayes_skip else output

    def logits(self, output: Tensor, rows_VE: Tensor) -> Tensor:
        """Token logits [N, V] of a prediction. A filler that is not trained on is never predicted: where a text has
        ended, its end token says so."""
        if self.predicts_tokens:
            return self._without_filler(output)
        x_NE, table_VE, bias_V = self._against_table(output, rows_VE)
        return nn.functional.linear(x_NE, table_VE, bias_V)

    def _against_table(self, output_NE: Tensor, rows_VE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x, table, bias): the logits of predicted embeddings are x @ table^T + bias."""
        bias_V = rows_VE.new_zeros(len(rows_VE))
        if self.config.network == "bert":
            output_NE, rows_VE, bias_V = (self.unshifted(output_NE), self.unshifted(rows_VE),
                                          self.token_bias.to(output_NE.dtype))
        return output_NE, rows_VE, self._without_filler(bias_V)

    def _without_filler(self, logits_NV: Tensor) -> Tensor:
        if self.config.diffusion.loss_over != "text":
            return logits_NV
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
        return self.denoiser.encode_sources(inputs_TE, log_snr_C, plan)

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
        output, _, _ = self._predict(plan, rows_VE[batch.tokens_T], noisy, log_snr_C, rows_VE, prior_NV, guess_NE, None)
        return output, rows_VE
