"""What cached conditioning saves: sampling against joint conditioning, and several draws per source against one.

    python benchmarks/sampling.py [--joint_steps 4] [--repeats 1]

On one CPU thread, fp32, in one process: d = 768, a source of 4,096 and a target of 256 tokens, experts, window and
heads of the `base` preset. Two layers of its twelve, and a vocabulary cut by the same factor, so that the output keeps
its share. Weights are random. Joint conditioning is timed with the same window, in which a target sees half a window of
its source, and with attention to everything, in which it sees all of it as in cached conditioning; it repeats one and
the same step, so fewer of its steps are timed and scaled up. Prints medians of CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.allocator import keep_freed_memory
from model.diffusion_lm import DiffusionLM
from model.packing import Segment, generation_batch, pack
from model.sampling import SamplerSettings, sample
from trainer.config_load import load
from trainer.randomness import training_draw

SOURCE, TARGET, STEPS, DRAWS, LAYERS = 4096, 256, 20, 8, 2


def initialised(conditioning: str, window: int = 512) -> DiffusionLM:
    base = load("base", overrides=["data.draws_per_source=1", f"model.attention.window={window}"])
    config = base.model
    model = DiffusionLM(replace(
        config, layers=LAYERS, vocab_size=base.data.vocab_size * LAYERS // config.layers,
        diffusion=replace(config.diffusion, conditioning=conditioning)))
    model.init_weights(0)
    return model


def source_tokens() -> np.ndarray:
    return np.concatenate([[1], np.random.default_rng(0).integers(4, 1000, SOURCE - 2), [2]])


def sampling(conditioning: str, steps: int, **changes: int) -> Callable[[], object]:
    model = initialised(conditioning, **changes).eval()
    batch = generation_batch([source_tokens()], canvas_tokens=TARGET, pad_id=3)
    return lambda: sample(model, batch, SamplerSettings(steps=steps))


def training(draws: int) -> Callable[[], object]:
    """Plan, forward and backward pass, as in a training step without its update."""
    model = initialised("cached")
    canvas = np.append(np.random.default_rng(1).integers(4, 1000, TARGET - 1), 2)
    batch = pack([Segment(source_tokens(), canvas, TARGET, 0)], np.zeros(1, np.int64), 1, np.arange(draws)[None], draws)
    draw = training_draw(batch, model.config, seed=0, step=0)

    def step() -> None:
        plan = model.prepare(batch, device="cpu", dtype=torch.float32)
        model(batch, plan, draw, TARGET * draws, len(batch)).total.backward()
    return step


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median CPU time."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--joint_steps", type=int, default=4, help="of joint sampling that are timed")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    sampling("cached", 1)()  # first calls allocate
    cached = seconds(sampling("cached", STEPS), arguments.repeats)
    print(f"source {SOURCE}, target {TARGET}, {STEPS} steps, {LAYERS} layers of width 768 (seconds of one thread)")
    for name, window in (("window 512", 512), ("everything", 2 * (SOURCE + TARGET))):
        joint = seconds(sampling("joint", arguments.joint_steps, window=window), arguments.repeats)
        joint *= STEPS / arguments.joint_steps
        print(f"sampling: joint, {name}: {joint:.1f}; cached {cached:.1f}: {joint / cached:.1f} x", flush=True)
    step = training(1)
    step()
    one, several = seconds(step, arguments.repeats), seconds(training(DRAWS), arguments.repeats)
    print(f"training step: 1 draw {one:.1f}, {DRAWS} draws {several:.1f}: {several / one:.2f} x")


if __name__ == "__main__":
    main()
