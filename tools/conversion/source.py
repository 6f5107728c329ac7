"""What is converted, whatever its form: named whole tensors that are read piece by piece, so that none need fit in
memory, and for training states what else a run needs to go on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from trainer.config import RunConfig

WEIGHTS, AVERAGE, MOMENTS = "fp32", "average", ("exp_avg", "exp_avg_sq")
"""Kinds of tensors that a parameter may have, each of its shape: trained weights, averaged weights, Adam's moments."""


@dataclass(frozen=True)
class TrainingFacts:
    """What a run needs to go on besides tensors, in plain values and DeepSpeed's own objects.

    manifest: what the checkpoint's manifest says of the run's progress. rows_per_step: packed rows of an optimizer
    step. adam_step: AdamW's count of updates. hyper: AdamW's settings that all groups share. scaler: the loss
    scaler's state. counters: DeepSpeed's counts of steps. ds_config: the DeepSpeed JSON. updates: of the average.
    random: random numbers' states, of each rank that had one.
    """

    manifest: dict
    rows_per_step: int
    adam_step: Tensor | int
    hyper: dict
    scaler: dict
    counters: dict
    ds_config: dict
    updates: int
    random: list[dict] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters that the model computes with."""
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            if self.ds_config.get(name, {}).get("enabled", False):
                return dtype
        return torch.float32


class Source(ABC):
    """shapes: of all parameters, whole, in the model's order. buffers: the model's other tensors. kinds: which tensors
    there are of each parameter. run: its configuration, vocabulary's size and special tokens filled in if known.
    vocabulary: its file, None if only the run's configuration tells where it is. step: None if unknown.
    training: None where there are only weights."""

    run: RunConfig
    shapes: dict[str, torch.Size]
    buffers: dict[str, Tensor]
    kinds: tuple[str, ...]
    vocabulary: Path | None
    step: int | None
    training: TrainingFacts | None = None

    @abstractmethod
    def pieces(self, kind: str, name: str, start: int, stop: int) -> Iterator[Tensor]:
        """Elements [start, stop) of a parameter, flattened, as consecutive flat tensors, which must not be changed."""

    def whole(self, kind: str, name: str) -> Tensor:
        """A parameter's tensor, in its shape, not to be changed."""
        shape = self.shapes[name]
        pieces = list(self.pieces(kind, name, 0, shape.numel()))
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(shape)
