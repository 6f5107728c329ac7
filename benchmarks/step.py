"""A training step of each recipe against the original DiffuSeq network, and what it costs in longer documents.

    python benchmarks/step.py

A step is plan, forward, backward and AdamW, on one thread in fp32, with as many tokens at every length. All networks
are 512 wide with 8 heads and 4 layers; the feed-forward of 8 experts, top-2, does the arithmetic of the dense one of
2,048. An eighth of a document, at most 256 tokens, is its target; where the speed at two lengths is compared, as many
tokens as of the longest document are targets in all the shorter ones together. The vocabulary is cut from 16,384 as the
depth is from 12 layers, so that the output keeps its share. The last block of `long_doc` leaves sources
out, which counts for more in 4 layers than in 12: for 12, with the same vocabulary, the ratio is worked out from the
median times of 2 and of 4 layers. The original is transformers' BERT encoder with DiffuSeq's projections and loss,
without dropout; as published it drops 0.1, of the attention weights too, for which PyTorch holds all of them. Both are
extended to the length. CPU time, contenders taking turns.

Limits: FLOPs are those of the shapes (`model/flops.py`), against those of matrix products of 2,048 x 2,048 on the same
core; time is divided among kinds of operations by PyTorch's profiler.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.original import OriginalDiffuSeq
from benchmarks.report import Report, parser
from benchmarks.timing import Run, Times, peak_mib, profiled, take_turns
from model.allocator import keep_freed_memory
from model.batch import PackedBatch
from model.config import ModelConfig
from model.diffusion_lm import DiffusionLM
from model.flops import training_flops
from model.packing import Segment, pack
from trainer.config_load import load
from trainer.hardware import flush_denormals
from trainer.randomness import training_draw

RECIPES = ("diffuseq", "moe_diffuseq", "long_doc")
LINEAR = ("moe_diffuseq", "long_doc")
"""Recipes whose cost is to grow with the length and no faster."""
ORIGINAL, PUBLISHED = "original", "original, dropout 0.1"
WIDTH, HEADS, LAYERS, EMBED, DENSE_FFN, EXPERT_FFN, WINDOW = 512, 8, 4, 128, 2048, 688, 256
SHALLOW, DEEP = LAYERS // 2, 12
VOCABULARY = 16384 * LAYERS // DEEP
GROWTH = (2048, 16384)


class Documents:
    """So many tokens in documents of `length`, an eighth of each its target, but no more than longest_target."""

    def __init__(self, length: int, tokens: int, longest_target: int = 256):
        self.length, self.count = length, max(1, tokens // length)
        self.target = min(length // 8, longest_target)
        self.tokens = self.count * length

    def packed(self) -> PackedBatch:
        random = np.random.default_rng(0)
        segments = []
        for index in range(self.count):
            ids = random.integers(4, VOCABULARY, self.length)
            segments.append(Segment(ids[:-self.target], ids[-self.target:], self.target, index))
        return pack(segments, np.zeros(self.count, np.int64), 1, np.arange(self.count)[:, None], self.count)


def config_of(recipe: str, documents: Documents, layers: int = LAYERS) -> ModelConfig:
    dense = recipe == "diffuseq"
    run = load("base", recipe, overrides=[
        "data.draws_per_source=1", f"data.max_source_tokens={documents.length - documents.target}",
        f"data.max_target_tokens={documents.target}", f"data.row_tokens={documents.length}",
        f"model.width={WIDTH}", f"model.layers={layers}", f"model.embed_dim={EMBED}", f"model.attention.heads={HEADS}",
        f"model.moe.ffn={DENSE_FFN if dense else EXPERT_FFN}",
        *(["model.dropout=0.0"] if dense else [f"model.attention.window={WINDOW}"])])
    return replace(run.model, vocab_size=VOCABULARY)


def updated(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def ours(recipe: str, documents: Documents, layers: int = LAYERS) -> Run:
    config = config_of(recipe, documents, layers)
    model = DiffusionLM(config)
    model.init_weights(0)
    batch = documents.packed()
    draw = training_draw(batch, config, 0, 0)
    trained = batch.in_loss_T.sum().item()

    def loss() -> torch.Tensor:
        plan = model.prepare(batch, device="cpu", dtype=torch.float32)
        return model(batch, plan, draw, trained, len(batch), documents.count * documents.target).total
    return updated(model, loss)


def original(dropout: float, documents: Documents, layers: int = LAYERS) -> Run:
    torch.manual_seed(0)
    model = OriginalDiffuSeq(vocab_size=VOCABULARY, embed_dim=EMBED, width=WIDTH, layers=layers, heads=HEADS,
                             ffn=DENSE_FFN, positions=documents.length, dropout=dropout)
    batch = documents.packed()
    tokens_Bn, is_target_Bn = (x.view(documents.count, -1) for x in (batch.tokens_T, batch.is_target_T))
    return updated(model, lambda: model.loss(tokens_Bn, is_target_Bn))


def flops(recipe: str, documents: Documents) -> int:
    config = config_of(recipe, documents)
    with torch.device("meta"):
        model = DiffusionLM(config)
    batch = documents.packed()
    return training_flops(config, model.prepare(batch, device="cpu", dtype=torch.float32), batch.sample_C.numel())


def published_gib(documents: Documents) -> float:
    """Memory for the attention weights of the published variant: of each layer three matrices that backward needs, and
    of one layer four more on the way."""
    return (3 * LAYERS + 4) * 4 * documents.count * HEADS * documents.length**2 / 2**30


def available_gib() -> float:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) / 2**20


def compare(report: Report, lengths: list[int], tokens: int, repeats: int) -> list[list[str]]:
    """Times at each length; returns rows on what limits each."""
    size = min(2048, tokens)
    a, b = torch.randn(2, size, size)
    rows, limits, curves = [], [], defaultdict(list)
    for length in lengths:
        documents = Documents(length, tokens)
        runs = {ORIGINAL: original(0.0, documents)} | {recipe: ours(recipe, documents) for recipe in RECIPES}
        if published_gib(documents) < 0.8 * available_gib():
            runs[PUBLISHED] = original(0.1, documents)
        shallow = {f"{ORIGINAL}, shallow": original(0.0, documents, SHALLOW)} | {
            f"{recipe}, shallow": ours(recipe, documents, SHALLOW) for recipe in LINEAR}
        times = take_turns({"matmul": lambda: a @ b, **runs, **shallow}, repeats)
        peak = 2 * size**3 / times.seconds("matmul").value
        for recipe in RECIPES:
            report.row(f"{recipe}.{length}", f"`{recipe}`, {length:,} tokens, against the original",
                       times.ratio(ORIGINAL, recipe))
        for recipe in LINEAR:
            report.row(f"deep.{recipe}.{length}", f"`{recipe}`, {length:,} tokens, against the original, {DEEP} layers",
                       deep_seconds(times, ORIGINAL) / deep_seconds(times, recipe))
        if PUBLISHED in runs:
            report.row(f"published.{length}", f"`long_doc`, {length:,} tokens, against the original as published",
                       times.ratio(PUBLISHED, "long_doc"))
        for name, run in runs.items():
            seconds = times.seconds(name).value
            curves[name].append((length, documents.tokens / seconds))
            if name != PUBLISHED:
                counted = flops("diffuseq" if name == ORIGINAL else name, documents)
                limits.append([name, f"{length:,}", f"{counted / documents.tokens / 1e6:,.0f} M",
                               f"{counted / seconds / peak:.0%}", *shares(run)])
        rows.append([f"{length:,}", f"{peak / 1e9:.0f} G", *(
            f"{documents.tokens / times.seconds(name).value:,.0f}" if name in runs
            else f"needs {published_gib(documents):.0f} GiB" for name in (ORIGINAL, PUBLISHED, *RECIPES))])
    report.table("Tokens a second of one thread", ["tokens", "matmul FLOP/s", ORIGINAL, PUBLISHED, *RECIPES], rows)
    report.plot("step_speed", "Training, tokens a second of one thread", "tokens of a document", "tokens/s", curves)
    return limits


def deep_seconds(times: Times, name: str) -> float:
    return times.deeper(name, f"{name}, shallow", LAYERS, SHALLOW, DEEP)


KINDS = {"matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
         "attention kernel": ("aten::_scaled_dot_product_flash_attention_for_cpu",
                              "aten::_scaled_dot_product_flash_attention_for_cpu_backward"),
         "update": ("Optimizer.step#AdamW.step",)}


def shares(run: Run) -> list[str]:
    """Parts of a step's CPU time, by KINDS and the rest, which reads and writes memory more than it computes."""
    events = profiled(run).key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    of_kind = {kind: sum(event.cpu_time_total if kind == "update" else event.self_cpu_time_total
                         for event in events if event.key in keys) for kind, keys in KINDS.items()}
    return [f"{part / whole:.0%}" for part in (*of_kind.values(), whole - sum(of_kind.values()))]


def growth(report: Report, short: int, long: int, repeats: int) -> None:
    runs = {(recipe, length): ours(recipe, Documents(length, long, longest_target=max(1, 256 * length // long)))
            for recipe in LINEAR for length in (short, long)}
    times = take_turns(runs, repeats)
    for recipe in LINEAR:
        report.row(f"growth.{recipe}.{long}", f"`{recipe}`, documents of {long:,} tokens: speed, of that in "
                   f"documents of {short:,}", times.ratio((recipe, short), (recipe, long)))


def memory(report: Report, lengths: list[int]) -> None:
    """One document of each length; what stays the same at all lengths is in every peak."""
    mib: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for length in lengths:
        documents = Documents(length, length)
        for name, run in {ORIGINAL: original(0.0, documents),
                          **{recipe: ours(recipe, documents) for recipe in LINEAR}}.items():
            run()  # makes AdamW's moments
            mib[name].append((length, peak_mib(run)))
    (a, first), (b, second), *_, (c, third), (d, last) = mib["long_doc"]
    report.row(f"memory.{d}", f"peak memory of `long_doc` that a token adds between {c:,} and {d:,} tokens, of that "
               f"between {a:,} and {b:,}", (last - third) / (d - c) / ((second - first) / (b - a)))
    report.plot("step_memory", "Peak memory of a training step, MiB", "tokens of a document", "MiB", mib)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    options.add_argument("--tokens", type=int, default=8192, help="of a step, when networks are compared")
    options.add_argument("--growth", type=int, nargs=2, default=GROWTH, help="shortest and longest document, when "
                         "lengths are compared")
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    flush_denormals()
    report = Report("step", __doc__)
    short, long = arguments.growth
    limits = compare(report, arguments.lengths, arguments.tokens, arguments.repeats)
    report.table("What limits each: share of the core's matrix products reached, parts of the time", [
        "network", "tokens", "FLOPs a token", "of peak", *KINDS, "the rest"], limits)
    growth(report, short, long, arguments.repeats)
    lengths = [short]
    while lengths[-1] < long:
        lengths.append(2 * lengths[-1])
    memory(report, lengths)
    report.write(arguments.json)


if __name__ == "__main__":
    main()
