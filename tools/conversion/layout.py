"""Where each element of each parameter lies in the files of a training checkpoint: which rank, which flat tensor.

A rank of ZeRO holds, for every parameter group, one flat piece of the fp32 weights, and of Adam's moments and the
averaged weights alike. Stages 1 and 2 lay the group's parameters end to end and cut the whole into equal pieces; stage
3 cuts every parameter by itself. Groups of sharded experts are cut among the ranks that hold the same experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from model.config import ModelConfig
from model.diffusion_lm import DiffusionLM
from model.moe.parallel import ExpertGroup
from trainer.expert_parallel import shard_experts
from trainer.parameter_groups import parameter_groups
from trainer.topology import zero_layout

_ALIGNMENT = 2  # elements: stages 1 and 2 fill a group up to a multiple of this for each of its ranks


@dataclass(frozen=True)
class Topology:
    """How a training state is spread: ranks, ranks that share the experts, ZeRO's stage (1, 2 or 3)."""

    world: int
    expert_parallel_size: int
    zero_stage: int


class Piece(NamedTuple):
    """`numel` elements of a parameter of the whole model, flattened, from `start` on, which lie from `offset` on in a
    partition."""

    name: str
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Partition:
    """One rank's flat tensor of a parameter group (stage 3: of a sub-group).

    shapes: all parameters of the (sub-)group as the rank's model holds them, in order. numel: with `filler` elements
    of zeros at the end. holders: the ranks among which it is cut. moe: of sharded experts.
    """

    group: int
    shapes: dict[str, torch.Size]
    pieces: tuple[Piece, ...]
    numel: int
    filler: int
    holders: tuple[int, ...]
    moe: bool


def empty_model(config: ModelConfig, shards: int = 1, shard: int = 0) -> DiffusionLM:
    """The model with names and shapes, but without memory for its weights; of experts those of one shard."""
    with torch.device("meta"):
        model = DiffusionLM(config)
        if shards > 1:
            shard_experts(model, ExpertGroup(shards, shard))
    return model


class Layout:
    """All partitions of a training state: `ranks[rank][index]`. groups: AdamW's, without their parameters.

    zero: the zero_optimization section of the DeepSpeed JSON.
    """

    def __init__(self, config: ModelConfig, topology: Topology, zero: dict, weight_decay: float):
        self.topology = topology
        shards = topology.expert_parallel_size
        models = [empty_model(config, shards, shard) for shard in range(shards)]
        groups = parameter_groups(models[0], weight_decay)
        self.groups = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        settings = zero_layout(zero)
        self.ranks = [self._partitions(models[rank % shards], rank, settings, weight_decay)
                      for rank in range(topology.world)]

    def _partitions(self, model: nn.Module, rank: int, settings: dict, weight_decay: float) -> list[Partition]:
        names = {parameter: name for name, parameter in model.named_parameters()}
        world, shards = self.topology.world, self.topology.expert_parallel_size
        partitions = []
        for number, group in enumerate(parameter_groups(model, weight_decay)):
            moe = group.get("moe", False)
            holders = tuple(range(rank % shards, world, shards)) if moe else tuple(range(world))
            shard = rank % shards if moe else 0
            shapes = {names[p]: p.shape for p in group["params"]}
            place = (number, holders, holders.index(rank), shard, moe)
            if self.topology.zero_stage == 3:
                partitions += [_cut_each(part, *place) for part in
                               _sub_groups(shapes, len(holders), settings["sub_group_size"])]
            else:
                if settings["round_robin_gradients"]:
                    order, count = list(shapes), len(holders)
                    shapes = {name: shapes[name] for first in range(count) for name in order[first::count]}
                partitions.append(_cut_whole(shapes, *place))
        return partitions


def _cut_whole(shapes: dict[str, torch.Size], group: int, holders: tuple[int, ...], index: int, shard: int,
               moe: bool) -> Partition:
    """Stages 1 and 2: the parameters end to end, then equal pieces."""
    total = sum(shape.numel() for shape in shapes.values())
    count = len(holders)
    numel = _ceil(total, _ALIGNMENT * count) * _ALIGNMENT
    first, last = index * numel, (index + 1) * numel
    pieces, begin = [], 0
    for name, shape in shapes.items():
        end = begin + shape.numel()
        low, high = max(begin, first), min(end, last)
        if low < high:
            pieces.append(Piece(name, shard * shape.numel() + low - begin, high - low, low - first))
        begin = end
    return Partition(group, shapes, tuple(pieces), numel, min(numel, max(0, last - total)), holders, moe)


def _cut_each(shapes: dict[str, torch.Size], group: int, holders: tuple[int, ...], index: int, shard: int,
              moe: bool) -> Partition:
    """Stage 3: equal pieces of every parameter, the last filled up; then end to end."""
    pieces, offset = [], 0
    for name, shape in shapes.items():
        part = _ceil(shape.numel(), len(holders))
        numel = min(part, shape.numel() - index * part)
        if numel > 0:
            pieces.append(Piece(name, shard * shape.numel() + index * part, numel, offset))
        offset += part
    return Partition(group, shapes, tuple(pieces), offset, 0, holders, moe)


def _sub_groups(shapes: dict[str, torch.Size], count: int, size: int) -> list[dict[str, torch.Size]]:
    """Stage 3 updates at most about `size` elements of a rank at once."""
    groups, filled = [{}], 0
    for name, shape in shapes.items():
        if filled >= size:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += _ceil(shape.numel(), count)
    return groups


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
