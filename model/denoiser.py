"""The denoiser, top to bottom: input embeddings -> local mixing -> blocks of (sparse attention, MoE) -> hidden states.

It works on a flat packed stream of T tokens. Everything that depends on the layout alone (attention plans, neighbour
and condition indices) is worked out beforehand on the CPU, in `StreamPlan`, so that the forward pass never waits for
the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention.backends import choose_backend
from model.attention.composed import sparse_attention
from model.attention.pattern import global_tokens, layer_patterns
from model.attention.plan import AttentionPlan, build_plan
from model.batch import TokenLayout
from model.config import ModelConfig
from model.layers import ModulatedNorm, NoiseLevelEmbedding, gather_neighbours, keyed_uniform, neighbour_index
from model.moe.layer import MoEAux, MoELayer
from model.rotary import rotary_tables, rotated_heads
from model.transfer import sent

SourceCache = list[tuple[Tensor, Tensor]]
"""Rotated keys and values [T_source, H, head_dim] of every layer."""


@dataclass(frozen=True)
class StreamPlan:
    """What the layout of a stream fixes: one attention plan per layer, neighbours, conditions, positions.

    condition_T: row of the noise-level table a token is modulated by; the last row is the sources' in cached
    conditioning, where sources know of no noise level. last_N: the tokens that the last block computes, if not all:
    of the others it only needs keys and values.
    """

    attention: list[AttentionPlan]
    neighbour_TW: Tensor
    condition_T: Tensor
    position_T: Tensor
    is_target_T: Tensor
    row_T: Tensor
    rows: int
    last_N: Tensor | None = None

    def to(self, device: torch.device | str) -> StreamPlan:
        moved: dict[int, AttentionPlan] = {}
        for plan in self.attention:
            if id(plan) not in moved:
                moved[id(plan)] = plan.to(device)
        names = ("neighbour_TW", "condition_T", "position_T", "is_target_T", "row_T")
        tensors = {name: sent(getattr(self, name), device) for name in names}
        last_N = None if self.last_N is None else sent(self.last_N, device)
        return StreamPlan(attention=[moved[id(plan)] for plan in self.attention], rows=self.rows, last_N=last_N,
                          **tensors)


class Projection(nn.Linear):
    """Queries, keys and values by one weight [3 D, D]."""

    def __init__(self, width: int):
        super().__init__(width, 3 * width, bias=False)

    def forward(self, x_TD: Tensor, asking_N: Tensor | None = None) -> tuple[Tensor, Tensor] | Tensor:
        """[T, 3 D]; with asking_N queries [N, D] of those tokens, and keys and values [T, 2 D] of all."""
        if asking_N is None:
            return super().forward(x_TD)
        asking, answering = self.weight.split([self.in_features, 2 * self.in_features])
        return nn.functional.linear(x_TD.index_select(0, asking_N), asking), nn.functional.linear(x_TD, answering)


class Attention(nn.Module):
    """Multi-head sparse attention with RoPE and normalised queries and keys."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv = Projection(width)
        self.out = nn.Linear(width, width, bias=False)
        self.q_gain = nn.Parameter(torch.ones(self.head_dim))
        self.k_gain = nn.Parameter(torch.ones(self.head_dim))

    def forward(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], plan: AttentionPlan,
                source: tuple[Tensor, Tensor] | None,
                asking_N: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """source: cached keys and values that stand before the stream's own. asking_N: the tokens whose output is
        wanted, all if None. Also returns the stream's own keys and values."""
        q, k, v = self.project(x_TD, rotary, asking_N)
        keys, values = (k, v) if source is None else (torch.cat((source[0], k)), torch.cat((source[1], v)))
        return self.out(sparse_attention(q, keys, values, plan).flatten(1)), (k, v)

    def project(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor],
                asking_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the asking tokens, keys and values of all [.., H, head_dim]; the first two normalised, rotated."""
        if asking_N is None:
            return self._heads(self.qkv(x_TD), rotary, self.q_gain, self.k_gain)
        q_ND, kv_TD = self.qkv(x_TD, asking_N)
        asking_rotary = tuple(table.index_select(0, asking_N) for table in rotary)
        return *self._heads(q_ND, asking_rotary, self.q_gain), *self._heads(kv_TD, rotary, self.k_gain)

    def _heads(self, projected: Tensor, rotary: tuple[Tensor, Tensor], *gains: Tensor) -> tuple[Tensor, ...]:
        return rotated_heads(projected.unflatten(1, (-1, self.heads, self.head_dim)), torch.stack(gains), rotary)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + MoE(norm(x)), both norms set by noise level."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = ModulatedNorm(config.width, config.time_dim)
        self.attention = Attention(config.width, config.attention.heads)
        self.moe_norm = ModulatedNorm(config.width, config.time_dim)
        self.moe = MoELayer(config.width, config.moe)

    def forward(self, x_TD: Tensor, condition_CD: Tensor, rotary: tuple[Tensor, Tensor], plan: StreamPlan,
                attention_plan: AttentionPlan, source: tuple[Tensor, Tensor] | None, jitter_T: Tensor | None,
                asking_N: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor], MoEAux]:
        """asking_N: the tokens that are computed, [N, D] then; of the others only keys and values. All if None."""
        condition_T, row_T = plan.condition_T, plan.row_T
        normed = self.attention_norm(x_TD, condition_CD, condition_T)
        attended, own = self.attention(normed, rotary, attention_plan, source, asking_N)
        if asking_N is not None:
            x_TD, condition_T, row_T = (each.index_select(0, asking_N) for each in (x_TD, condition_T, row_T))
            jitter_T = None if jitter_T is None else jitter_T.index_select(0, asking_N)
        x_TD = x_TD + attended
        jitter_TD = None if jitter_T is None else keyed_uniform(jitter_T, x_TD.shape[1])
        mixed, aux = self.moe(self.moe_norm(x_TD, condition_CD, condition_T), row_T, plan.rows, jitter_TD)
        return x_TD + mixed, own, aux


class Denoiser(nn.Module):
    """See the module's docstring. `prepare` runs on the CPU once per batch, `forward` on the device."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.patterns = layer_patterns(config)
        self.recompute: frozenset[int] = frozenset()  # blocks under activation checkpointing; set by the trainer
        inputs = config.embed_dim * (2 if config.diffusion.self_conditioning > 0 else 1)
        self.input = nn.Linear(max(config.local_mixing, 1) * inputs, config.width)
        self.side = nn.Parameter(torch.zeros(2, config.width))
        self.noise_level = NoiseLevelEmbedding(config.time_dim)
        self.source_level = nn.Parameter(torch.zeros(config.time_dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = ModulatedNorm(config.width, config.time_dim)

    def init_weights(self, seed: int) -> None:
        """Normal weights of deviation 1/sqrt(fan_in); what writes into the residual stream is scaled down by depth."""
        generator = torch.Generator().manual_seed(seed)
        depth_scale = 1 / math.sqrt(2 * self.config.layers)
        linears = [self.input, self.noise_level.net[0], self.noise_level.net[2]]
        for block in self.blocks:
            linears += [block.attention.qkv, block.attention.out]
        for linear in linears:
            nn.init.normal_(linear.weight, std=linear.in_features ** -0.5, generator=generator)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.normal_(self.side, std=0.02, generator=generator)
        nn.init.normal_(self.source_level, std=0.02, generator=generator)
        with torch.no_grad():
            for index, block in enumerate(self.blocks):
                block.moe.init_weights(seed, index)
                block.attention.out.weight.mul_(depth_scale)
                for experts in filter(None, (block.moe.experts, block.moe.shared)):
                    experts.w2.mul_(depth_scale)

    def prepare(self, tokens_T: Tensor, document_T: Tensor, position_T: Tensor, is_target_T: Tensor, draw_T: Tensor,
                copy_T: Tensor, copies: int, row_T: Tensor, rows: int, *, device: torch.device | str,
                dtype: torch.dtype, queries: str = "all", last: str = "all") -> StreamPlan:
        """Works out the layout on the CPU. queries="target": only target tokens are computed, against source keys
        from a cache; the stream given is then that of all tokens, sources first, and the plan that of the targets.
        last="target": of a stream of all tokens the last block computes the targets only."""
        config, last_N = self.config, None
        is_global_T = global_tokens(config.attention.global_tokens, tokens_T=tokens_T, document_T=document_T,
                                    position_T=position_T, is_target_T=is_target_T, draw_T=draw_T,
                                    eos_id=config.eos_id)
        layout = TokenLayout(document_T, position_T, is_target_T, draw_T, is_global_T)
        backend, _ = choose_backend(config.attention.backend, device, dtype, config.head_dim)
        asked = [queries] * config.layers
        if queries == "all" and last == "target":
            asked[-1], last_N = "target", is_target_T.nonzero().flatten()
        kinds = list(zip(self.patterns, asked, strict=True))
        plans = {kind: build_plan(layout, kind[0], head_dim=config.head_dim, dtype=dtype, backend=backend,
                                  queries=kind[1]) for kind in set(kinds)}
        seen = slice(None) if queries == "all" else is_target_T
        joint = config.diffusion.conditioning == "joint"
        side_T = torch.zeros_like(is_target_T) if joint else is_target_T
        condition_T = copy_T if joint else torch.where(is_target_T, copy_T, copies)
        return StreamPlan(
            attention=[plans[kind] for kind in kinds],
            neighbour_TW=neighbour_index(document_T[seen], side_T[seen], draw_T[seen],
                                         max(config.local_mixing, 1)),
            condition_T=condition_T[seen], position_T=position_T[seen], is_target_T=is_target_T[seen],
            row_T=row_T[seen], rows=rows, last_N=last_N)

    def forward(self, inputs_TE: Tensor, log_snr_C: Tensor, plan: StreamPlan, source_cache: SourceCache | None = None,
                jitter_T: Tensor | None = None) -> tuple[Tensor, SourceCache, list[MoEAux]]:
        """inputs_TE: the embedding (and the previous estimate, side by side) of every token. jitter_T: int64 keys of
        the routers' jitter, None for none.

        Returns hidden states [T, D], of the plan's last_N only if it has one; the stream's own keys and values by
        layer, and what each MoE layer reports.
        """
        x_TD, condition_CD, rotary = self._enter(inputs_TE, log_snr_C, plan)
        keys_values, reports = [], []
        for index, block in enumerate(self.blocks):
            arguments = (x_TD, condition_CD, rotary, plan, plan.attention[index],
                         None if source_cache is None else source_cache[index],
                         None if jitter_T is None else jitter_T + index,
                         plan.last_N if block is self.blocks[-1] else None)
            if index in self.recompute and torch.is_grad_enabled():
                x_TD, own, aux = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_TD, own, aux = block(*arguments)
            keys_values.append(own)
            reports.append(aux)
        condition_T = plan.condition_T if plan.last_N is None else plan.condition_T.index_select(0, plan.last_N)
        return self.norm(x_TD, condition_CD, condition_T), keys_values, reports

    def encode_sources(self, inputs_TE: Tensor, log_snr_C: Tensor, plan: StreamPlan) -> SourceCache:
        """What `forward` returns as keys and values for a stream of sources. The last block is left after them: nobody
        reads what it would make of a source."""
        x_TD, condition_CD, rotary = self._enter(inputs_TE, log_snr_C, plan)
        keys_values = []
        for index, block in enumerate(self.blocks[:-1]):
            x_TD, own, _ = block(x_TD, condition_CD, rotary, plan, plan.attention[index], None, None, None)
            keys_values.append(own)
        last = self.blocks[-1]
        normed, nobody = last.attention_norm(x_TD, condition_CD, plan.condition_T), plan.row_T.new_empty(0)
        _, k, v = last.attention.project(normed, rotary, nobody)
        return [*keys_values, (k, v)]

    def _enter(self, inputs_TE: Tensor, log_snr_C: Tensor,
               plan: StreamPlan) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The stream as the first block meets it [T, D], the noise levels' conditions [C + 1, D], the rotary tables."""
        dtype = self.side.dtype
        x_TD = self.input(gather_neighbours(inputs_TE.to(dtype), plan.neighbour_TW))
        # A product, because its gradient adds up all tokens in fp32, where looking rows up would in bf16.
        x_TD = x_TD + torch.stack((~plan.is_target_T, plan.is_target_T), -1).to(dtype) @ self.side
        condition_CD = torch.cat((self.noise_level(log_snr_C, dtype), self.source_level[None]))
        return x_TD, condition_CD, rotary_tables(plan.position_T, self.config.head_dim, self.config.attention.rope_base)
