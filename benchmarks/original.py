"""DiffuSeq (Gong et al. 2023, arXiv 2210.08933) as its authors built it, on the BERT encoder of transformers, for
timing: its network and one training step with its loss. Rows are padded to one length and all positions see all others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEncoder

_STEPS = 2000


class OriginalDiffuSeq(nn.Module):
    """Sizes as in `ModelConfig`. dropout: 0.1 as published, of the embeddings, the encoder and its attention weights.
    Letters: B rows, n positions."""

    def __init__(self, *, vocab_size: int, embed_dim: int, width: int, layers: int, heads: int, ffn: int,
                 positions: int, dropout: float):
        super().__init__()
        config = BertConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                            intermediate_size=ffn, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
                            max_position_embeddings=positions)
        config._attn_implementation = "sdpa"
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.rounding = nn.Linear(embed_dim, vocab_size)
        self.rounding.weight = self.embedding.weight
        self.time = nn.Sequential(nn.Linear(embed_dim, 4 * embed_dim), nn.SiLU(), nn.Linear(4 * embed_dim, width))
        self.up = nn.Sequential(nn.Linear(embed_dim, width), nn.Tanh(), nn.Linear(width, width))
        self.position = nn.Embedding(positions, width)
        self.norm, self.dropout = nn.LayerNorm(width, eps=config.layer_norm_eps), nn.Dropout(dropout)
        self.encoder = BertEncoder(config)
        self.down = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, embed_dim))
        alpha_bar_t = 1 - (torch.arange(1, _STEPS + 1) / _STEPS + 1e-4).sqrt()
        self.register_buffer("alpha_bar_t", alpha_bar_t.clamp(min=1e-4))

    def predict(self, z_BnE: Tensor, step_B: Tensor) -> Tensor:
        frequency = torch.exp(-math.log(10000) * torch.arange(z_BnE.shape[-1] // 2) / (z_BnE.shape[-1] // 2))
        angle = step_B[:, None] * frequency
        time_BD = self.time(torch.cat((angle.cos(), angle.sin()), -1))
        x_BnD = self.up(z_BnE) + self.position.weight[:z_BnE.shape[1]] + time_BD[:, None]
        return self.down(self.encoder(self.dropout(self.norm(x_BnD))).last_hidden_state)

    def loss(self, tokens_Bn: Tensor, is_target_Bn: Tensor) -> Tensor:
        """Squared error of the prediction, length of the signal left at the noisiest step, and rounding's
        cross-entropy, over all positions; only targets are noised."""
        step_B = torch.randint(_STEPS, (len(tokens_Bn),))
        clean_BnE = self.embedding(tokens_Bn)
        clean_BnE = clean_BnE + (1 - self.alpha_bar_t[0]).sqrt() * torch.randn_like(clean_BnE)
        kept = self.alpha_bar_t[step_B][:, None, None]
        noisy_BnE = kept.sqrt() * clean_BnE + (1 - kept).sqrt() * torch.randn_like(clean_BnE)
        z_BnE = torch.where(is_target_Bn[..., None], noisy_BnE, clean_BnE)
        error = (self.predict(z_BnE, step_B) - clean_BnE).square().mean()
        left = self.alpha_bar_t[-1] * clean_BnE.square().mean()
        rounding = nn.functional.cross_entropy(self.rounding(clean_BnE).flatten(0, 1), tokens_Bn.flatten())
        return error + left + rounding
