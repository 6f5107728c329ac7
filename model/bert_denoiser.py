"""DiffuSeq's network (Gong et al. 2023, arXiv 2210.08933), top to bottom, on the packed stream:

    h = LayerNorm(up(x) + position + time)                      up: Linear, Tanh, Linear
    for every layer:  h = LayerNorm(h + attention(h)),  h = LayerNorm(h + W2 gelu(W1 h))
    prediction = down(h)                                        down: Linear, Tanh, Linear (`down_projection`)

`up` and `down` are left out where the embeddings are as wide as the network. The encoder is BERT's (Devlin et al.
2019) without a mask: within its document every token sees every other one in the window of `model.attention`, which
the recipe makes wider than any document. Dropout follows the embeddings, each attention and each feed-forward; the
attention probabilities themselves are not dropped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention.composed import sparse_attention
from model.attention.pattern import layer_patterns
from model.attention.plan import AttentionPlan
from model.config import ModelConfig
from model.denoiser import Denoiser, SourceCache, StreamPlan
from model.diffusion.schedule import NoiseSchedule
from model.errors import ConfigError
from model.layers import keyed_dropout
from model.moe.layer import MoEAux

_EPS = 1e-12  # of BERT's LayerNorm
TIME_SCALE = 1000.0
"""The network is told step * TIME_SCALE / T, so that its sinusoids do not depend on T."""


def time_features(time_C: Tensor, dim: int) -> Tensor:
    """Sinusoids [C, dim] in fp32: the cosines of time / 10000^(k / (dim / 2)), then the sines."""
    half = dim // 2
    order = torch.arange(half, dtype=torch.float32, device=time_C.device)
    angle = time_C.float()[:, None] * torch.exp(-math.log(10000.0) * order / half)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def _projection(inputs: int, hidden: int, outputs: int) -> nn.Module:
    if inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def down_projection(config: ModelConfig) -> nn.Module:
    """From the encoder's output to the predicted embedding."""
    return _projection(config.width, config.width, config.embed_dim)


class BertBlock(nn.Module):
    """Post-norm: LayerNorm(x + dropout(attention(x))), then LayerNorm(x + dropout(feed-forward(x)))."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.index, self.dropout = index, config.dropout
        self.heads, self.head_dim = config.attention.heads, config.head_dim
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.attention_norm = nn.LayerNorm(config.width, eps=_EPS)
        self.up = nn.Linear(config.width, config.moe.ffn)
        self.down = nn.Linear(config.moe.ffn, config.width)
        self.output_norm = nn.LayerNorm(config.width, eps=_EPS)

    def forward(self, x_TD: Tensor, plan: AttentionPlan, dropout_T: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x_TD).view(-1, 3, self.heads, self.head_dim).unbind(1)
        attended = self.out(sparse_attention(q, k, v, plan).flatten(1))
        x_TD = self.attention_norm(x_TD + keyed_dropout(attended, dropout_T, 2 * self.index + 1, self.dropout))
        mixed = self.down(nn.functional.gelu(self.up(x_TD)))
        return self.output_norm(x_TD + keyed_dropout(mixed, dropout_T, 2 * self.index + 2, self.dropout))


class BertDenoiser(nn.Module):
    """See the module's docstring. Serves as `Denoiser` does, with neither experts nor a cache of sources."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.patterns, self.schedule = config, layer_patterns(config), NoiseSchedule(config)
        self.recompute: frozenset[int] = frozenset()  # blocks under activation checkpointing; set by the trainer
        self.up = _projection(config.embed_dim, config.width, config.width)
        self.time = nn.Sequential(nn.Linear(config.time_dim, 4 * config.time_dim), nn.SiLU(),
                                  nn.Linear(4 * config.time_dim, config.width))
        self.position = nn.Parameter(torch.empty(config.max_positions, config.width))
        self.norm = nn.LayerNorm(config.width, eps=_EPS)
        self.blocks = nn.ModuleList(BertBlock(config, index) for index in range(config.layers))

    def prepare(self, tokens_T: Tensor, document_T: Tensor, position_T: Tensor, *others: object,
                **settings: object) -> StreamPlan:
        """As `Denoiser.prepare`, whose layout follows from configuration and patterns alone. ConfigError for a
        document that is longer than the table of positions."""
        longest = int(position_T.max()) + 1
        if longest > self.config.max_positions:
            raise ConfigError("model.max_positions", f"is {self.config.max_positions}, but a document has {longest} "
                              "tokens: raise it, or cut documents shorter")
        return Denoiser.prepare(self, tokens_T, document_T, position_T, *others, **settings)

    def init_weights(self, generator: torch.Generator) -> None:
        """As in the original: positions are standard normal, and linear layers PyTorch's own (`init_linears`)."""
        nn.init.normal_(self.position, generator=generator)
        init_linears(self, generator)

    def forward(self, inputs_TE: Tensor, log_snr_C: Tensor, plan: StreamPlan,
                dropout_T: Tensor | None = None) -> tuple[Tensor, SourceCache, list[MoEAux]]:
        """inputs_TE: the embedding of every token, in the table's own coordinates. dropout_T: int64 keys, None for no
        dropout. Returns the encoder's output [T, D], and nothing for caches and experts."""
        dtype = self.position.dtype
        time_C = self.schedule.step_at(log_snr_C) * (TIME_SCALE / self.config.diffusion.steps)
        time_CD = self.time(time_features(time_C, self.config.time_dim).to(dtype))
        x_TD = self.up(inputs_TE.to(dtype))
        for table, row_T in ((self.position, plan.position_T), (time_CD, plan.condition_T)):
            # Not by indexing, whose gradient of a row that many tokens share is rounded to bf16 after every token.
            x_TD = x_TD + nn.functional.embedding(row_T, table)
        x_TD = keyed_dropout(self.norm(x_TD), dropout_T, 0, self.config.dropout)
        for block, attention in zip(self.blocks, plan.attention, strict=True):
            arguments = (x_TD, attention, dropout_T)
            recompute = block.index in self.recompute and torch.is_grad_enabled()
            x_TD = checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
        return x_TD, [], []


def init_linears(module: nn.Module, generator: torch.Generator) -> None:
    """Weights and biases of all linear layers uniform within 1 / sqrt(fan_in), norms at one and zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            bound = part.in_features ** -0.5
            nn.init.uniform_(part.weight, -bound, bound, generator=generator)
            nn.init.uniform_(part.bias, -bound, bound, generator=generator)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
