"""What the benchmarks are to show: bounds of their figures, by the figures' keys.

Ratios are within one run. On the CPU: one thread, fp32; on the GPU: an H200, bf16.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """key: of the row that shows it, beginning with the part that measures it. at_most: the bound is the greatest good
    value instead of the least."""

    key: str
    what: str
    bound: float
    unit: str = "x"
    at_most: bool = False

    @property
    def part(self) -> str:
        return self.key.partition(".")[0]

    def reached(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


_LENGTHS = {512: 0.9, 2048: 1.3, 8192: 3.2}

GOALS = [
    Goal("attention.of_dense.2048", "windowed attention against the faster of masked and unmasked dense attention, "
         "2,048 tokens", 3.2),
    Goal("attention.of_dense.8192", "windowed attention against dense attention, 8,192 tokens", 12),
    Goal("attention.of_longformer.2048", "windowed attention against Hugging Face's Longformer, 2,048 tokens", 1.3),
    Goal("attention.of_longformer.8192", "windowed attention against Longformer's, 8,192 tokens", 3.8),
    Goal("attention.growth", "attention's time per token at 16,384 tokens, of that at 2,048", 1.1, at_most=True),
    Goal("moe.4096.512.1024.2.8", "speed of 8 experts, of that of a dense feed-forward of the same FLOPs", 0.9),
    Goal("moe.4096.512.1024.2.32", "speed of 32 experts, of that of a dense feed-forward of the same FLOPs", 0.75),
    *(Goal(f"step.{recipe}.{length}", f"training step of `{recipe}` against DiffuSeq's network, {length:,} tokens",
           bound) for recipe in ("long_doc", "moe_diffuseq") for length, bound in _LENGTHS.items()),
    *(Goal(f"step.growth.{recipe}.16384", f"training speed of `{recipe}` in documents of 16,384 tokens, of that "
           "in documents of 2,048", 0.9) for recipe in ("long_doc", "moe_diffuseq")),
    Goal("step.memory.16384", "peak memory of a training step that a token adds from 8,192 to 16,384 tokens, of that "
         "from 2,048 to 4,096", 1.1, at_most=True),
    Goal("sampling.cached.4096", "generation with cached conditioning against joint, source of 4,096 tokens", 8),
    Goal("sampling.draws.4096", "training step with 8 noised copies of a target, of that with one", 2, at_most=True),
    Goal("data.exposed", "share of a step in which training waits for its data", 2, "%", at_most=True),
    *(Goal(f"checkpoint.{which}_share", f"training waits for the {which} save in the background, of a save at once", 10,
           "%", at_most=True) for which in ("first", "later")),
    Goal("balance.variation", "variation of the experts' load in the worst layer, with the balance loss", 0.5, "",
         at_most=True),
    Goal("balance.cost", "what the balance loss adds to the cross-entropy", 1, "%", at_most=True),
    Goal("resume.failed", "failed tests that a resumed run is the same bit by bit, and that a run killed while saving "
         "goes on", 0, "", at_most=True),
    Goal("gpu.attention.of_peak", "window of 512, heads of 128, 16,384 tokens, forward: useful FLOP/s, of the measured "
         "matmul peak", 25, "%"),
    Goal("gpu.attention.of_full", "that window: FLOP/s on the tiles that are computed, of full "
         "flash attention's", 85, "%"),
    Goal("gpu.step.mfu", "training step of the `base` model: useful FLOP/s, of the GPU's peak", 25, "%"),
    Goal("gpu.step.of_dense", "training step of the `base` model: speed, of its twin with a dense feed-forward", 0.75),
]
"""In the order of the page."""

GOAL_OF = {goal.key: goal for goal in GOALS}
