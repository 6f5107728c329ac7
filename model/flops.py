"""Floating-point operations that a batch needs, counted from the shapes that are computed.

A multiply and an add are two. Attention counts the pairs that the pattern allows, not those of the tiles that a kernel
visits; experts count the top_k that each token passes. A backward pass counts as two forward passes. Recomputation
(activation checkpointing) is not counted: it is the kernel's or the memory's price, not the model's.
"""

from __future__ import annotations

from model.config import ModelConfig
from model.diffusion_lm import BatchPlan


def forward_flops(config: ModelConfig, plan: BatchPlan, copies: int, predicted: int) -> int:
    """One pass over a batch with `copies` noised copies, in which `predicted` tokens reach the output head."""
    moe, width = config.moe, config.width
    tokens, targets = plan.stream.position_T.numel(), plan.target_N.numel()
    inputs = config.embed_dim * (2 if config.diffusion.self_conditioning > 0 else 1)
    matrices = 3 if moe.gated else 2
    router = moe.experts if config.network == "sparse" else 0
    queries = width * (2 * width + router + matrices * (moe.top_k * moe.ffn + moe.shared_ffn))
    layer = 2 * width**2 + queries  # keys and values come first
    unasked = 0 if plan.stream.last_N is None else tokens - targets  # of which the last block makes nothing else
    if config.network == "sparse":
        stem = max(config.local_mixing, 1) * inputs * width
        level = ((2 * config.layers + 1) * config.time_dim * 2 * width * (copies + 1)  # modulation of every norm
                 + 2 * config.time_dim**2 * copies)
        head = width * (config.vocab_size if config.diffusion.loss == "cross_entropy" else config.embed_dim)
    else:
        stem = head = 0 if config.embed_dim == width else width * (config.embed_dim + width)
        level = 4 * config.time_dim * (config.time_dim + width) * copies
    products = tokens * (stem + config.layers * layer) - unasked * queries + level + predicted * head
    if config.input == "bayes" or config.bayes_skip:
        products += targets * config.embed_dim * config.vocab_size
    if config.input == "bayes":
        products += targets * config.embed_dim * config.vocab_size
    attention = sum(2 * attended.pairs * config.head_dim for attended in plan.stream.attention)
    return 2 * (products + attention)


def training_flops(config: ModelConfig, plan: BatchPlan, copies: int) -> int:
    """Forward and backward pass of one micro-batch, with the first estimate of self-conditioning where it is on."""
    once = forward_flops(config, plan, copies, plan.scored_S.numel())
    if config.diffusion.self_conditioning > 0:
        return 3 * once + forward_flops(config, plan, copies, plan.target_N.numel())
    return 3 * once
