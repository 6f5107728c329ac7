"""How a run is spread over its ranks: which ways there are, and that a checkpoint belongs to one of them."""

from __future__ import annotations

import math
from pathlib import Path

from model.errors import ConfigError
from trainer.config import RunConfig
from trainer.ds_config import DSConfig
from trainer.errors import CheckpointError

RESHARD = ("python tools/convert_checkpoint.py {source} TO --format checkpoint --world {world} "
           "--expert_parallel_size {expert_parallel_size} --zero_stage {zero_stage}")
"""The command that converts a checkpoint to another topology."""
_LAYOUT = ("round_robin_gradients", "sub_group_size")
_SUB_GROUP = 1_000_000_000  # DeepSpeed's default


def topology(run: RunConfig, ds: DSConfig, world: int) -> dict[str, int]:
    """What the files of a checkpoint depend on, kept in its manifest."""
    return {"world": world, "zero_stage": ds.zero_stage, "expert_parallel_size": run.train.expert_parallel_size,
            "rows_per_step": ds.rows_per_step(world), **zero_layout(ds.values["zero_optimization"])}


def zero_layout(zero: dict) -> dict[str, int]:
    """The settings of `zero_optimization` that decide which elements lie where in ZeRO's files. Those that its stage
    does not look at have their defaults."""
    stage_3 = zero["stage"] == 3
    return {"round_robin_gradients": bool(not stage_3 and zero.get("round_robin_gradients", False)),
            "sub_group_size": int(zero.get("sub_group_size", _SUB_GROUP)) if stage_3 else _SUB_GROUP}


def check_topology(run: RunConfig, ds: DSConfig, world: int) -> None:
    """Refuses, with ConfigError, a number of expert shards that does not fit experts and ranks, and settings of
    DeepSpeed that do not go with it."""
    size, experts = run.train.expert_parallel_size, run.model.moe.experts
    key = "train.expert_parallel_size"
    if experts % size or world % size:
        raise ConfigError(key, f"is {size}, but must divide model.moe.experts = {experts} and the number of ranks, "
                          f"{world}: use {_nearest(size, math.gcd(experts, world))}")
    if size == 1:
        return
    if not run.model.moe.gated:
        raise ConfigError(key, f"is {size}, but experts without gate have no w3, which DeepSpeed's checkpoints of "
                          "sharded experts must hold: set it to 1, or model.moe.gated to true")
    if ds.precision == "fp16":
        raise ConfigError("fp16", f"is not supported with {key} = {size}: enable bf16 instead ({ds.path})")
    for name in ("contiguous_gradients", "reduce_scatter"):
        if not ds.values["zero_optimization"].get(name, True):
            raise ConfigError(f"zero_optimization.{name}", f"must be true, its default, with {key} = {size} "
                              f"({ds.path})")


def check_same(path: Path, saved: dict[str, int], here: dict[str, int]) -> None:
    """Refuses, with CheckpointError, to resume a checkpoint at `path` that was saved in another topology."""
    changed = [name for name in here if saved[name] != here[name]]
    if not changed:
        return
    was, now = (", ".join(f"{name} = {values[name]}" for name in changed) for values in (saved, here))
    laid_out = [f"zero_optimization.{name}" for name in changed if name in _LAYOUT]
    if laid_out and "zero_stage" not in changed:
        remedy = f"give {' and '.join(laid_out)} the value again that the run began with"
    elif saved["rows_per_step"] != here["rows_per_step"]:
        remedy = ("choose micro-batch and accumulation so that rows_per_step, their product with the ranks, is "
                  f"{saved['rows_per_step']} again, or begin a new run from the exported model with --init_from")
    else:
        remedy = f"start it as it was saved, or convert it: {RESHARD.format(source=path, **here)}"
    raise CheckpointError(f"{path} was saved with {was}, this run has {now}: {remedy}")


def _nearest(wanted: int, number: int) -> str:
    """The divisors of `number` next to `wanted`, for people."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d < wanted], [d for d in divisors if d > wanted]
    return " or ".join(map(str, below[-1:] + above[:1]))
