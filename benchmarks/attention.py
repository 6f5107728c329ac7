"""Composed CPU attention against PyTorch's dense attention and Hugging Face's Longformer, in one run on one thread.

    python benchmarks/attention.py

Forward and backward in fp32, W = 256, 8 heads x 64, one document. Times are medians of CPU time, which is wall time
on an idle machine; contenders take turns, so that a busy machine disturbs all alike. Dense attention: the faster of
masked and unmasked. Longformer: the products of Hugging Face's sliding chunks alone. Memory is the peak of what the
operation allocates beyond its inputs and masks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Report, parser
from benchmarks.timing import Run, peak_mib, take_turns
from model.allocator import keep_freed_memory
from model.attention.composed import sparse_attention
from model.attention.pattern import AttentionPattern, allowed
from model.attention.plan import build_plan
from model.batch import TokenLayout

HEADS, HEAD_DIM, WINDOW = 8, 64, 256
PLAIN, DILATED = (1,) * HEADS, (1, 1, 1, 1, 2, 2, 4, 4)
CONTENDERS = ("composed", "dense, masked", "dense", "Longformer")
GROWTH = (2048, 16384)


def one_document(tokens: int, global_prefix: int = 0) -> TokenLayout:
    position_T = torch.arange(tokens)
    zero_T = torch.zeros(tokens, dtype=torch.int64)
    return TokenLayout(zero_T, position_T, zero_T.bool(), zero_T, position_T < global_prefix)


def forward_backward(attend: Callable[..., Tensor], shape: tuple[int, ...]) -> Run:
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(shape, generator=generator) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(attend(*inputs), inputs, dout)


def composed(tokens: int, dilations: tuple[int, ...] = PLAIN, global_prefix: int = 0) -> Run:
    pattern = AttentionPattern((WINDOW // 2, WINDOW // 2), dilations, cached=False)
    plan = build_plan(one_document(tokens, global_prefix), pattern, head_dim=HEAD_DIM, dtype=torch.float32,
                      backend="cpu_band")
    return forward_backward(lambda q, k, v: sparse_attention(q, k, v, plan), (tokens, HEADS, HEAD_DIM))


def dense(tokens: int, masked: bool) -> Run:
    mask = None
    if masked:
        pattern = AttentionPattern((WINDOW // 2, WINDOW // 2), (1,), cached=False)
        mask = torch.zeros(tokens, tokens).masked_fill_(~allowed(one_document(tokens), pattern)[0], -torch.inf)
    return forward_backward(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, mask),
                            (1, HEADS, tokens, HEAD_DIM))


def longformer(tokens: int) -> Run:
    """The sliding-chunks products and the softmax alone, without projections or global tokens."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    module = LongformerSelfAttention(LongformerConfig(
        hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, attention_window=[WINDOW]), layer_id=0)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = module._sliding_chunks_query_key_matmul(q / HEAD_DIM**0.5, k, WINDOW // 2)
        return module._sliding_chunks_matmul_attn_probs_value(score.softmax(-1), v, WINDOW // 2)

    return forward_backward(attend, (1, tokens, HEADS, HEAD_DIM))


def compare_lengths(report: Report, lengths: list[int], dense_limit: int, repeats: int) -> None:
    rows, memory = [], {}
    for tokens in lengths:
        runs = {"composed": composed(tokens), "Longformer": longformer(tokens)}
        if tokens <= dense_limit:
            runs |= {"dense, masked": dense(tokens, True), "dense": dense(tokens, False)}
        times, mib = take_turns(runs, repeats), {name: peak_mib(run) for name, run in runs.items()}
        if tokens <= dense_limit:
            faster = min("dense", "dense, masked", key=lambda name: times.seconds(name).value)
            report.row(f"of_dense.{tokens}", f"{tokens:,} tokens, against dense attention",
                       times.ratio(faster, "composed"))
        report.row(f"of_longformer.{tokens}", f"{tokens:,} tokens, against Longformer",
                   times.ratio("Longformer", "composed"))
        rows.append([f"{tokens:,}", *(f"{1e3 * times.seconds(name).value:,.0f} ms, {mib[name]:,.0f} MiB"
                                      if name in runs else "–" for name in CONTENDERS)])
        for name in runs:
            memory.setdefault(name, []).append((tokens, mib[name]))
    report.table("Time and peak memory", ["tokens", *CONTENDERS], rows)
    report.plot("attention_memory", "Peak memory of attention, MiB", "tokens", "MiB", memory)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    options.add_argument("--dense_limit", type=int, default=8192, help="longest length given to dense attention")
    options.add_argument("--patterns_at", type=int, default=8192, help="length at which patterns are compared")
    options.add_argument("--repeats", type=int, default=5)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    report = Report("attention", __doc__)

    compare_lengths(report, arguments.lengths, arguments.dense_limit, arguments.repeats)
    short, long = GROWTH
    growth = take_turns({"short": composed(short), "long": composed(long)}, 2 * arguments.repeats)
    report.row("growth", f"time per token at {long:,} tokens, of that at {short:,}",
               growth.ratio("long", "short").scaled(short / long))
    patterns = {"plain": composed(arguments.patterns_at), "dilated": composed(arguments.patterns_at, DILATED),
                "dilated, 16 global tokens": composed(arguments.patterns_at, DILATED, 16)}
    times = take_turns(patterns, 2 * arguments.repeats)
    for index, name in enumerate(list(patterns)[1:]):
        report.row(f"pattern.{index}", f"{name}, {arguments.patterns_at:,} tokens: time, of the plain window's",
                   times.ratio(name, "plain"))
    report.write(arguments.json)


if __name__ == "__main__":
    main()
