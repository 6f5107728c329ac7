"""What a checkpoint holds, in words."""

from __future__ import annotations

import math
from pathlib import Path

from tools.conversion.files import CHUNK
from tools.conversion.sharded import ShardedCheckpoint
from tools.conversion.source import Source


def summary(path: Path, source: Source) -> str:
    """Kind, step, topology, sizes and the main figures of the model, a line each."""
    model = source.run.model
    total = sum(shape.numel() for shape in source.shapes.values())
    experts = sum(shape.numel() for name, shape in source.shapes.items() if ".experts." in name)
    lines = [f"{path}: {type(source).__name__}, whole", f"step {source.step}" if source.step is not None else None,
             f"{total:,} parameters in {len(source.shapes)} tensors, {experts:,} of them experts'; of each: "
             + ", ".join(source.kinds),
             f"model: {model.layers} layers of width {model.width}, {model.moe.experts} experts (top-"
             f"{model.moe.top_k}), vocabulary of {model.vocab_size}"]
    if isinstance(source, ShardedCheckpoint):
        place = source.topology
        lines.append(f"saved by {place.world} ranks, train.expert_parallel_size = {place.expert_parallel_size}, ZeRO "
                     f"stage {place.zero_stage}")
    if source.training is not None:
        facts = source.training
        guard = facts.manifest.get("guard", {})
        lines.append(f"training in {str(facts.dtype).removeprefix('torch.')}: {facts.rows_per_step} rows a step, "
                     f"{int(facts.adam_step)} updates, {guard.get('skipped', 0)} steps skipped")
    return "\n".join(line for line in lines if line)


def health(source: Source, every: bool) -> tuple[str, list[str]]:
    """Norm and root mean square of all tensors of each kind, with `every` of each tensor; and which tensors hold NaN or
    infinity."""
    lines, sick = [], []
    for kind in source.kinds:
        squares = 0.0
        for name, shape in source.shapes.items():
            square = sum(float(part.double().square().sum())
                         for piece in source.pieces(kind, name, 0, shape.numel()) for part in piece.split(CHUNK))
            squares += square
            if not math.isfinite(square):
                sick.append(f"{kind} of {name}")
            if every:
                lines.append(f"  {kind:10} {name} {list(shape)} rms {math.sqrt(square / max(1, shape.numel())):.4g}")
        total = sum(shape.numel() for shape in source.shapes.values())
        lines.append(f"{kind}: norm {math.sqrt(squares):.6g}, root mean square {math.sqrt(squares / total):.4g}")
    return "\n".join(lines), sick


def differences(one: Source, other: Source) -> list[str]:
    """A line for every difference in what both hold; empty if there is none."""
    lines = []
    if one.step != other.step:
        lines.append(f"step: {one.step} and {other.step}")
    if set(one.kinds) != set(other.kinds):
        lines.append(f"of each parameter: {', '.join(one.kinds)} and {', '.join(other.kinds)}")
    for name in sorted(one.shapes.keys() ^ other.shapes.keys()):
        lines.append(f"{name}: only in the {'first' if name in one.shapes else 'second'}")
    for name in one.shapes.keys() & other.shapes.keys():
        if one.shapes[name] != other.shapes[name]:
            lines.append(f"{name}: shapes {list(one.shapes[name])} and {list(other.shapes[name])}")
            continue
        for kind in one.kinds:
            if kind in other.kinds:
                a, b = one.whole(kind, name), other.whole(kind, name)
                if not a.equal(b):
                    lines.append(f"{kind} of {name}: differ by up to {(a.double() - b.double()).abs().max():.3g}")
    for name in one.buffers.keys() & other.buffers.keys():
        if not one.buffers[name].equal(other.buffers[name]):
            lines.append(f"{name}: differs")
    return lines
