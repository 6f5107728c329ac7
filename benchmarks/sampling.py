"""What cached conditioning saves: sampling against joint conditioning, and several draws per source against one.

    python benchmarks/sampling.py

On one CPU thread, fp32, in one process: d = 768, a source of 4,096 and a target of 256 tokens, experts, window and
heads of the `base` preset. Four layers of its twelve, and a vocabulary cut by the same factor, so that the output keeps
its share. In cached conditioning the last block leaves sources out, which counts for more in 4 layers than in 12: for
12, with the same vocabulary, ratios are worked out from the median times of 2 and of 4. Weights are random. Joint
conditioning is timed with the same window, in which a target sees half a window of its source, and with attention to
everything, in which it sees all of it as in cached conditioning; it repeats one and the same step, so fewer of its
steps are timed and scaled up. CPU time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Report, parser
from benchmarks.timing import Run, take_turns
from model.allocator import keep_freed_memory
from model.diffusion_lm import DiffusionLM
from model.packing import Segment, generation_batch, pack
from model.sampling import SamplerSettings, sample
from trainer.config_load import load
from trainer.randomness import training_draw

SOURCE, TARGET, STEPS, DRAWS = 4096, 256, 20, 8
LAYERS, SHALLOW, DEEP = 4, 2, 12


def initialised(conditioning: str, layers: int, **attention: int) -> DiffusionLM:
    base = load("base", overrides=["data.draws_per_source=1", *(
        f"model.attention.{name}={value}" for name, value in attention.items())])
    config = base.model
    model = DiffusionLM(replace(
        config, layers=layers, vocab_size=base.data.vocab_size * LAYERS // config.layers,
        diffusion=replace(config.diffusion, conditioning=conditioning)))
    model.init_weights(0)
    return model


def source_tokens(count: int) -> np.ndarray:
    return np.concatenate([[1], np.random.default_rng(0).integers(4, 1000, count - 2), [2]])


def sampling(conditioning: str, layers: int, source: int, steps: int, **changes: int) -> Callable[[], object]:
    model = initialised(conditioning, layers, **changes).eval()
    batch = generation_batch([source_tokens(source)], canvas_tokens=TARGET, pad_id=3)
    return lambda: sample(model, batch, SamplerSettings(steps=steps))


def training(layers: int, source: int, draws: int) -> Callable[[], object]:
    """Plan, forward and backward pass, as in a training step without its update."""
    model = initialised("cached", layers)
    canvas = np.append(np.random.default_rng(1).integers(4, 1000, TARGET - 1), 2)
    segment = Segment(source_tokens(source), canvas, TARGET, 0)
    batch = pack([segment], np.zeros(1, np.int64), 1, np.arange(draws)[None], draws)
    draw = training_draw(batch, model.config, seed=0, step=0)

    def step() -> None:
        plan = model.prepare(batch, device="cpu", dtype=torch.float32)
        model(batch, plan, draw, TARGET * draws, len(batch), TARGET * draws).total.backward()
    return step


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--source", type=int, default=SOURCE, help=f"tokens of the source (default: {SOURCE})")
    options.add_argument("--joint_steps", type=int, default=4, help="of joint sampling that are timed (default: 4)")
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    report = Report("sampling", __doc__)
    steps = {"cached": STEPS, "joint, everything": arguments.joint_steps, "joint, window": arguments.joint_steps}
    source, counts = arguments.source, {"1": 1, str(DRAWS): DRAWS}
    runs: dict[str, Run] = {}
    for name, layers in (("{}", LAYERS), ("{}, shallow", SHALLOW)):
        runs |= {name.format("cached"): sampling("cached", layers, source, STEPS),
                 name.format("joint, everything"): sampling("joint", layers, source, arguments.joint_steps,
                                                            window=2 * (source + TARGET), dilation=1),
                 name.format("joint, window"): sampling("joint", layers, source, arguments.joint_steps)}
        runs |= {name.format(copies): training(layers, source, draws) for copies, draws in counts.items()}
    times = take_turns(runs, arguments.repeats)
    scale = STEPS / arguments.joint_steps

    def deep_ratio(slower: str, faster: str) -> float:
        slow, fast = (times.deeper(name, f"{name}, shallow", LAYERS, SHALLOW, DEEP) for name in (slower, faster))
        return slow / fast

    for key, slower, attention in (("cached", "joint, everything", "attention to everything"),
                                   ("cached_of_window", "joint, window", "the same window")):
        what = f"generation, against joint conditioning with {attention}"
        report.row(f"{key}.{source}", what, times.ratio(slower, "cached").scaled(scale))
        report.row(f"deep.{key}.{source}", f"{what}, {DEEP} layers", deep_ratio(slower, "cached") * scale)
    what = f"training step with {DRAWS} noised copies of the target: time, of that with one"
    report.row(f"draws.{source}", what, times.ratio(str(DRAWS), "1"))
    report.row(f"deep.draws.{source}", f"{what}, {DEEP} layers", deep_ratio(str(DRAWS), "1"))
    report.table("Seconds of one thread", ["what", "seconds"], [
        *([f"generation, {name}", times.seconds(name).value * STEPS / count] for name, count in steps.items()),
        *([f"training step, copies: {name}", times.seconds(name).value] for name in counts)])
    report.write(arguments.json)


if __name__ == "__main__":
    main()
