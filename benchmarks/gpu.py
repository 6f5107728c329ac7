"""Kernels and whole training steps on a GPU, in bf16; first, whether the kernels are right.

    bash benchmarks/gpu.sh

The tests that need a GPU compare each kernel with exact references. Then, in turns: the window of 512 with heads of 128
against full flash attention and against FlexAttention with the same window; experts of the `base` preset against a
dense feed-forward of the same active FLOPs; and the training step of the `base` preset (plan made beforehand, forward,
backward, AdamW on fp32 weights) against twins with a dense feed-forward and with attention to everything, whose memory
is the peak of a step with what the network keeps. FLOPs are those of the shapes (`model/flops.py`); tiles are those
that FlashAttention-2 computes, 128 queries by 64 keys. What fails is said, and costs no other figure. `--tiny` shrinks
everything, so that it runs on a CPU as well, where it shows no more than that it runs.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Report, parser
from benchmarks.resume import verdicts
from benchmarks.timing import Run, Spread, Times, take_turns
from model.attention.backends import UNAVAILABLE
from model.attention.composed import sparse_attention
from model.attention.pattern import AttentionPattern
from model.attention.plan import AttentionPlan, build_plan
from model.batch import TokenLayout
from model.config import ModelConfig
from model.diffusion_lm import DiffusionLM
from model.flops import training_flops
from model.moe.backends import BACKENDS
from model.moe.layer import MoELayer
from model.moe.router import MoEAux
from model.packing import Segment, pack
from trainer.config_load import load
from trainer.hardware import peak_flops
from trainer.randomness import training_draw

TESTS = ("tests/model/attention/test_gpu.py", "tests/model/moe/test_moe_backends.py",
         "tests/trainer/test_expert_use.py")
TILE = (128, 64)


@dataclass(frozen=True)
class Sizes:
    """attention_at: the length of the stated goals. experts: numbers of them. base: --set values on the preset. calls:
    of a kernel in a turn; step_calls: of a training step."""

    matmul: int
    lengths: tuple[int, ...]
    attention_at: int
    heads: int
    window: int
    moe_tokens: int
    experts: tuple[int, ...]
    step_tokens: int
    base: tuple[str, ...]
    calls: int
    step_calls: int


REAL = Sizes(matmul=8192, lengths=(4096, 16384, 65536), attention_at=16384, heads=16, window=512, moe_tokens=32768,
             experts=(8, 32), step_tokens=65536, base=(), calls=10, step_calls=2)
TINY = Sizes(matmul=64, lengths=(64, 128), attention_at=128, heads=2, window=16, moe_tokens=64, experts=(4,),
             step_tokens=128, calls=1, step_calls=1, base=(
                 "model.width=32", "model.layers=1", "model.embed_dim=16", "model.time_dim=16",
                 "model.attention.heads=2", "model.attention.window=16", "model.moe.experts=4", "model.moe.ffn=32",
                 "data.draws_per_source=2", "data.max_target_tokens=8", "data.vocab_size=320"))


class Bench:
    """Device, precision, sizes and report, which all measurements share."""

    def __init__(self, sizes: Sizes, device: torch.device, repeats: int):
        self.sizes, self.device, self.repeats = sizes, device, repeats
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.report, self.failed = Report("gpu" if sizes is REAL else "gpu_tiny", __doc__), False

    def turns(self, runs: dict[str, Run], calls: int | None = None) -> Times:
        """Of those that run. Each turn is several calls in a row, so that the wait at its end does not count."""
        calls = calls or self.sizes.calls

        def several(run: Run) -> Run:
            return lambda: [run() for _ in range(calls)]

        working = {name: several(run) for name, run in runs.items() if self.attempt(name, run)}
        times = take_turns(working, self.repeats, clock=self.clock)
        return Times({name: [each / calls for each in taken] for name, taken in times.items()})

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def attempt(self, what: str, measure: Run) -> bool:
        """Whether it went well. One failure must not cost the other measurements: it is said, and the exit code tells
        of it."""
        try:
            measure()
            self.clock()  # a kernel's error comes with the wait for it
        except (Exception, SystemExit):
            self.failed = True
            print(f"FAILED: {what}\n{traceback.format_exc()}", flush=True)
            return False
        return True

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)


def check(bench: Bench) -> None:
    found = verdicts(TESTS, "-m", "gpu")
    skipped = [name for name, verdict in found if verdict == "skipped"]
    bad = [name for name, verdict in found if verdict == "failed"]
    bench.report.row("tests", "tests of the kernels that ran", len(found) - len(skipped), "")
    bench.report.row("tests_failed", "tests of the kernels that failed", len(bad), "")
    if bad or skipped:
        bench.report.table("Tests that did not pass", ["test", "verdict"], [
            *([name, "failed"] for name in bad), *([name, "skipped"] for name in skipped)])
    bench.failed |= bool(bad)


def matmul_peak(bench: Bench) -> float:
    """FLOP/s of a large square product."""
    size = bench.sizes.matmul
    a, b = bench.random(size, size), bench.random(size, size)
    found = bench.turns({"matmul": lambda: a @ b}).seconds("matmul")
    peak = 2 * size**3 / found.value
    bench.report.row("matmul", f"matrix product of {size:,} x {size:,}", peak / 1e12, "TFLOP/s")
    return peak


def window_plan(bench: Bench, tokens: int, head_dim: int, backend: str) -> AttentionPlan:
    position_T, zero_T = torch.arange(tokens), torch.zeros(tokens, dtype=torch.int64)
    pattern = AttentionPattern((bench.sizes.window // 2,) * 2, (1,) * bench.sizes.heads, cached=False)
    return build_plan(TokenLayout(zero_T, position_T, zero_T.bool(), zero_T, zero_T.bool()), pattern,
                      head_dim=head_dim, dtype=bench.dtype, backend=backend).to(bench.device)


def tile_pairs(tokens: int, side: int) -> int:
    """(query, key) pairs in the tiles that a window of `side` to each side touches."""
    rows, columns = TILE
    pairs = 0
    for first in range(0, tokens, rows):
        low, high = max(0, first - side) // columns, -(-min(tokens, first + rows + side) // columns)
        pairs += rows * columns * (high - low)
    return pairs


def measure_attention(bench: Bench, tokens: int, peak: float, head_dim: int = 128) -> None:
    sizes, side = bench.sizes, bench.sizes.window // 2
    cuda = bench.device.type == "cuda"
    q, k, v, dout = (bench.random(tokens, sizes.heads, head_dim) for _ in range(4))
    runs: dict[str, Callable[..., Tensor]] = {}
    plan = None
    for name, unavailable in UNAVAILABLE.items():
        if unavailable(bench.device, bench.dtype, head_dim) is None and not (cuda and name == "reference"):
            plan = window_plan(bench, tokens, head_dim, name)
            runs[name] = lambda q, k, v, plan=plan: sparse_attention(q, k, v, plan)

    def dense(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *qkv: attend(*(x.transpose(0, 1)[None] for x in qkv))[0].transpose(0, 1)

    def full(*qkv: Tensor) -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            return F.scaled_dot_product_attention(*qkv)

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() <= side

    def flexible() -> None:
        compiled = partial(torch.compile, dynamic=False) if cuda else (lambda function: function)
        mask = compiled(flex_attention.create_block_mask)(near, None, None, tokens, tokens, device=bench.device)
        flex = compiled(flex_attention.flex_attention)
        runs["FlexAttention"] = dense(lambda q, k, v: flex(q, k, v, block_mask=mask))

    runs["full flash"] = dense(full)
    bench.attempt("FlexAttention's mask", flexible)

    with torch.no_grad():
        forward = bench.turns({name: lambda run=run: run(q, k, v) for name, run in runs.items()})
    inputs = [x.requires_grad_() for x in (q, k, v)]
    both = bench.turns({name: lambda run=run: torch.autograd.grad(run(*inputs), inputs, dout)
                        for name, run in runs.items()
                        if name in forward and (cuda or name != "FlexAttention")})  # it has no backward on a CPU
    ours = [name for name in both if name in UNAVAILABLE]
    bench.report.table(f"Attention, {tokens:,} tokens, {sizes.heads} heads of {head_dim}", [
        "kernel", "forward ms", "forward and backward ms"], [
        [name, 1e3 * forward.seconds(name).value, 1e3 * both.seconds(name).value if name in both else "–"]
        for name in forward])
    for name in ours if "full flash" in both else []:
        bench.report.row(f"attention.{name}.{tokens}", f"`{name}`, {tokens:,} tokens, forward and backward: against "
                         "full flash attention", both.ratio("full flash", name))
    fastest = min(ours, key=lambda name: forward.seconds(name).value)
    if "FlexAttention" in both:
        bench.report.row(f"attention.of_flex.{tokens}", f"`{fastest}`, {tokens:,} tokens, forward and backward: "
                         "against FlexAttention", both.ratio("FlexAttention", fastest))
    if tokens == sizes.attention_at:
        flops = 4 * head_dim * plan.pairs
        useful = forward.seconds(fastest).value
        bench.report.row("attention.of_peak", f"`{fastest}`, {tokens:,} tokens, forward: useful FLOP/s, of the "
                         "measured matmul peak", 100 * flops / useful / peak, "%")
        if "full flash" not in forward:
            return
        on_tiles = 4 * head_dim * sizes.heads * tile_pairs(tokens, side) / useful
        whole = 4 * head_dim * sizes.heads * tokens**2 / forward.seconds("full flash").value
        bench.report.row("attention.of_full", f"`{fastest}`, {tokens:,} tokens, forward: FLOP/s on the tiles, of full "
                         "flash attention's", 100 * on_tiles / whole, "%")


def measure_experts(bench: Bench) -> None:
    config, width = base_config(bench).moe, base_config(bench).width
    tokens = bench.sizes.moe_tokens
    x, dy = bench.random(tokens, width).requires_grad_(), bench.random(tokens, width)
    row_T = torch.arange(tokens, device=bench.device) * 4 // tokens

    def layer(experts: int, backend: str) -> Run:
        made = MoELayer(width, replace(config, experts=experts, backend=backend)).to(bench.dtype)
        made.init_weights(0, 0)
        made.to(bench.device)

        def step() -> object:
            y, aux = made(x, row_T, 4)
            return torch.autograd.grad([y, aux.balance_sum, aux.z_sum], [x, *made.parameters()],
                                       [dy, torch.ones_like(aux.balance_sum), torch.ones_like(aux.z_sum)])
        return step

    dense = DenseFeedForward(width, config.top_k * config.ffn).to(bench.device, bench.dtype)
    runs: dict[str, Run] = {
        "dense": lambda: torch.autograd.grad(dense(x, row_T, 4)[0], [x, *dense.parameters()], dy)}
    for name, backend in BACKENDS.items():
        refusal = backend.unavailable(bench.device, bench.dtype, width, config.ffn)
        if refusal is None and not (bench.device.type == "cuda" and name == "reference"):
            runs |= {f"{name}, {count} experts": layer(count, name) for count in bench.sizes.experts}
    times = bench.turns(runs)
    for name in [name for name in times if name != "dense" and "dense" in times]:
        bench.report.row(f"experts.{name.replace(', ', '.').removesuffix(' experts')}", f"`{name}`, {tokens:,} tokens: "
                         "speed, of a dense feed-forward's", times.ratio("dense", name))


class DenseFeedForward(nn.Module):
    """A gated feed-forward in the place of an MoE layer; reports as a layer whose experts cost nothing."""

    def __init__(self, width: int, ffn: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * ffn, bias=False), nn.Linear(ffn, width, bias=False)

    def forward(self, x_TD: Tensor, row_T: Tensor, rows: int, jitter_noise_TD: Tensor | None = None):
        gate, up = self.up(x_TD).chunk(2, -1)
        nothing = x_TD.new_zeros((), dtype=torch.float32)
        return self.down(F.silu(gate) * up), MoEAux(nothing, nothing, nothing, nothing, nothing)


def base_config(bench: Bench, *changes: str) -> ModelConfig:
    run = load("base", "long_doc", overrides=[*bench.sizes.base, *changes])
    return replace(run.model, vocab_size=run.data.vocab_size)


def measure_step(bench: Bench, length: int, is_goal: bool) -> None:
    data = load("base", "long_doc", overrides=list(bench.sizes.base)).data
    targets = data.draws_per_source * data.max_target_tokens
    documents = max(1, bench.sizes.step_tokens // length)
    random = np.random.default_rng(0)
    segments = [Segment(random.integers(4, 256, length - targets), random.integers(4, 256, data.max_target_tokens),
                        data.max_target_tokens, index) for index in range(documents)]
    copies = documents * data.draws_per_source
    batch = pack(segments, np.zeros(documents, np.int64), 1, np.arange(copies).reshape(documents, -1), copies)
    base = base_config(bench)
    dense = replace(base.moe, experts=1, top_k=1, ffn=base.moe.top_k * base.moe.ffn)
    networks = {"base": base, "dense feed-forward": replace(base, moe=dense),
                "attention to everything": base_config(bench, f"model.attention.window={2 * length}",
                                                       "model.attention.dilation=1")}
    runs: dict[str, Run] = {}
    flops, memory = {}, {}
    for name, config in networks.items():
        def build(name: str = name, config: ModelConfig = config) -> None:
            held = allocated(bench.device)
            model = DiffusionLM(config)
            model.init_weights(0)
            if name == "dense feed-forward":
                for block in model.denoiser.blocks:
                    block.moe = DenseFeedForward(config.width, config.moe.ffn)
            model.to(bench.device, bench.dtype)
            plan = model.prepare(batch, device=bench.device, dtype=bench.dtype).to(bench.device)
            draw, moved = training_draw(batch, config, 0, 0).to(bench.device), batch.to(bench.device)
            counts = int(batch.in_loss_T.sum()), len(batch), int(batch.is_target_T.sum())
            update = updated(model)

            def step() -> None:
                model(moved, plan, draw, *counts).total.backward()
                update()
            step()  # makes AdamW's moments
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step()
            flops[name] = training_flops(config, plan, copies)
            memory[name] = allocated(bench.device, peak=True) - held
            runs[name] = step

        bench.attempt(f"step of {name}", build)
    times = bench.turns(runs, bench.sizes.step_calls)
    peak = peak_flops(bench.device, bench.dtype)
    mfu = {name: f"{100 * flops[name] / times.seconds(name).value / peak:.1f} %" if peak else "–" for name in times}
    bench.report.table(f"Training step, {len(batch):,} tokens in documents of {length:,}", [
        "network", "tokens/s", "MFU", "memory"], [
        [name, len(batch) / times.seconds(name).value, mfu[name],
         f"{memory[name] / 2**30:.1f} GiB" if bench.device.type == "cuda" else "–"] for name in times])
    if "base" not in times:
        return
    if peak:
        share = Spread.of([100 * flops["base"] / each / peak for each in times["base"]])
        bench.report.row("step.mfu" if is_goal else f"step.mfu.{length}", f"step of `base`, documents of {length:,} "
                         "tokens: useful FLOP/s, of the GPU's peak", share, "%")
    for name in [name for name in times if name != "base"]:
        key = "step.of_dense" if is_goal and name == "dense feed-forward" else f"step.{name.split()[0]}.{length}"
        bench.report.row(key, f"step of `base`, documents of {length:,} tokens: speed, of its twin with {name}",
                         times.ratio(name, "base"))


def allocated(device: torch.device, *, peak: bool = False) -> int:
    """Bytes of tensors on a GPU, now or at most since the peak was reset."""
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def updated(model: nn.Module) -> Run:
    """AdamW's step on fp32 copies of the weights, from their gradients, which are freed."""
    weights = list(model.parameters())
    masters = [weight.detach().float().clone() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)

    def update() -> None:
        for master, weight in zip(masters, weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
    return update


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--tiny", action="store_true", help="small sizes, on the CPU where there is no GPU")
    options.add_argument("--repeats", type=int, default=5)
    arguments = options.parse_args()
    if not (torch.cuda.is_available() or arguments.tiny):
        options.error("PyTorch sees no CUDA device here; --tiny runs without one")
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(TINY if arguments.tiny else REAL, device, arguments.repeats)
    sizes = bench.sizes
    if device.type == "cuda":
        bench.attempt("the tests of the kernels", lambda: check(bench))
    peak = matmul_peak(bench)
    parts: dict[str, Run] = {
        **{f"attention, {tokens} tokens": partial(measure_attention, bench, tokens, peak) for tokens in sizes.lengths},
        "experts": partial(measure_experts, bench),
        **{f"step, {length} tokens": partial(measure_step, bench, length, length == sizes.attention_at)
           for length in sizes.lengths}}
    for what, measure in parts.items():
        bench.attempt(what, measure)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        bench.report.write(arguments.json)  # after every part: whoever is cut off keeps what there is
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
