"""Composed CPU attention against PyTorch's dense attention and Hugging Face's Longformer, in one run on one thread.

    python benchmarks/attention.py --out attention.json

Forward and backward in fp32, W = 256, 8 heads x 64, one document. Times are medians of CPU time, which is wall time
on an idle machine; candidates take turns, so that a busy machine disturbs all alike. Memory is the peak of what the
operation allocates beyond its inputs and masks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.allocator import keep_freed_memory
from model.attention.composed import sparse_attention
from model.attention.pattern import AttentionPattern, allowed
from model.attention.plan import build_plan
from model.batch import TokenLayout

HEADS, HEAD_DIM, WINDOW = 8, 64, 256
PLAIN, DILATED = (1,) * HEADS, (1, 1, 1, 1, 2, 2, 4, 4)
Run = Callable[[], None]


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


def times(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, after one call to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if repeat:
                taken[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def peak_mib(run: Run) -> float:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = peak = 0
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def compare_lengths(lengths: list[int], dense_limit: int, repeats: int) -> list[dict]:
    rows = []
    titles = " ".join(f"{name:>17}" for name in ("composed", "SDPA masked", "SDPA", "Longformer"))
    print(f"{'tokens':>7} {titles}   of SDPA  of Longformer")
    for tokens in lengths:
        runs = {"composed": composed(tokens), "longformer": longformer(tokens)}
        if tokens <= dense_limit:
            runs |= {"sdpa_masked": dense(tokens, True), "sdpa": dense(tokens, False)}
        ms, mib = times(runs, repeats), {name: peak_mib(run) for name, run in runs.items()}
        row = {"tokens": tokens, "ms": ms, "peak_mib": mib, "of_longformer": ms["longformer"] / ms["composed"]}
        if tokens <= dense_limit:
            row["of_sdpa"] = min(ms["sdpa_masked"], ms["sdpa"]) / ms["composed"]
        cells = [f"{ms[name]:8.1f} ms {mib[name]:4.0f} M" if name in ms else f"{'-':>17}"
                 for name in ("composed", "sdpa_masked", "sdpa", "longformer")]
        of_sdpa = f"{row['of_sdpa']:8.2f}x" if "of_sdpa" in row else f"{'-':>9}"
        print(f"{tokens:>7} {' '.join(cells)} {of_sdpa} {row['of_longformer']:12.2f}x", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--dense_limit", type=int, default=8192, help="longest length given to dense attention")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()

    rows = compare_lengths(arguments.lengths, arguments.dense_limit, arguments.repeats)
    per_token = times({str(n): composed(n) for n in (2048, 16384)}, 2 * arguments.repeats)
    growth = per_token["16384"] / 16384 / (per_token["2048"] / 2048)
    print(f"time per token at 16,384 tokens against 2,048: {growth:.3f}")
    patterns = times({"plain": composed(8192), "dilated": composed(8192, DILATED),
                      "dilated, 16 globals": composed(8192, DILATED, 16)}, 2 * arguments.repeats)
    costs = {name: ms / patterns["plain"] for name, ms in patterns.items()}
    print("at 8,192 tokens, of the plain window:", ", ".join(f"{name} {cost:.2f}" for name, cost in costs.items()))
    if arguments.out:
        report = {"torch": torch.__version__, "threads": 1, "window": WINDOW, "heads": HEADS, "head_dim": HEAD_DIM,
                  "repeats": arguments.repeats, "lengths": rows, "time_per_token_16384_of_2048": growth,
                  "pattern_cost_of_plain": costs}
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
