"""Reads a run's training checkpoint as whole named tensors, whatever ranks, expert shards and ZeRO stage it has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tools.conversion.configuration import read_configuration
from tools.conversion.files import load
from tools.conversion.layout import Layout, Topology, empty_model
from tools.conversion.source import AVERAGE, MOMENTS, WEIGHTS, Source, TrainingFacts
from trainer import checkpoint
from trainer.engine import TAG, rank_file
from trainer.errors import CheckpointError

SCALER = ("loss_scaler", "dynamic_loss_scale", "overflow")
COUNTERS = ("skipped_steps", "global_steps", "global_samples")
_PER_GROUP = ("params", "weight_decay", "name", "moe")  # of AdamW's settings


def model_states_file(zero_stage: int, rank: int) -> str:
    """DeepSpeed's name for a rank's model states; in stages 1 and 2 only rank 0 has some."""
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if zero_stage == 3 else "mp_rank_00_model_states.pt"


def optimizer_states_file(rank: int, dtype: torch.dtype) -> str:
    """DeepSpeed's name for a rank's optimizer states."""
    prefix = "bf16_" if dtype == torch.bfloat16 else ""
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def adam(state: dict, zero_stage: int) -> dict:
    """AdamW's own state inside a rank's optimizer states."""
    return state["optimizer_state_dict" if zero_stage == 3 else "base_optimizer_state"]


def fp32(state: dict, zero_stage: int) -> list[Tensor]:
    """The fp32 weights inside a rank's optimizer states."""
    return state["fp32_flat_groups" if zero_stage == 3 else "single_partition_of_fp32_groups"]


class ShardedCheckpoint(Source):
    """A folder `step-*` of a run, or one that was converted. Every file is checked against the manifest first."""

    def __init__(self, folder: Path):
        manifest = checkpoint.check(folder)
        self._folder = folder
        self.topology = Topology(**{key: manifest["topology"][key] for key in
                                    ("world", "expert_parallel_size", "zero_stage")})
        self.step = manifest["step"]
        stage = self.topology.zero_stage
        first = load(folder / TAG / model_states_file(stage, 0))
        ds_config = first["ds_config"]
        names = {name: shape for group in first["param_shapes"] for name, shape in group.items()}
        self.run, self.vocabulary = read_configuration(folder, names["embedding"][0])
        model = empty_model(self.run.model)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.buffers = {name: first["module"][name].clone() for name in first["buffer_names"]}
        self._ranks = [self._read_rank(rank, ds_config) for rank in range(self.topology.world)]
        state, progress = self._ranks[0]
        settings = adam(state, stage)
        self.training = TrainingFacts(
            manifest={key: value for key, value in manifest.items() if key not in ("files", "topology", "step")},
            rows_per_step=manifest["topology"]["rows_per_step"], adam_step=settings["state"][0]["step"],
            hyper={key: value for key, value in settings["param_groups"][0].items() if key not in _PER_GROUP},
            scaler={key: state[key] for key in SCALER}, counters={key: first[key] for key in COUNTERS},
            ds_config=ds_config, updates=progress["updates"], random=[each["random"] for _, each in self._ranks])
        self.kinds = (WEIGHTS, *MOMENTS, *([AVERAGE] if progress["ema"] else []))
        self._layout = Layout(self.run.model, self.topology, ds_config["zero_optimization"],
                              self.run.optim.weight_decay)
        self._where = self._index()

    def _read_rank(self, rank: int, ds_config: dict) -> tuple[dict, dict]:
        dtype = torch.bfloat16 if ds_config.get("bf16", {}).get("enabled", False) else torch.float32
        return (load(self._folder / TAG / optimizer_states_file(rank, dtype))["optimizer_state_dict"],
                load(self._folder / rank_file(rank)))

    def _index(self) -> dict[str, list[tuple[int, int, int, int, int]]]:
        """name -> (start, numel, rank, partition, offset) of all its pieces in order. CheckpointError unless they make
        up every parameter exactly, and the files hold as much as the layout says."""
        where: dict[str, list] = {name: [] for name in self.shapes}
        for rank, partitions in enumerate(self._layout.ranks):
            state, _ = self._ranks[rank]
            found = [entry["exp_avg"].numel() for entry in adam(state, self.topology.zero_stage)["state"].values()]
            if found != [partition.numel for partition in partitions]:
                raise CheckpointError(f"{self._folder}: rank {rank} holds parts of {found} elements, where its "
                                      f"configuration says {[partition.numel for partition in partitions]}")
            for number, partition in enumerate(partitions):
                self._check_mapping(rank, number)
                for piece in partition.pieces:
                    where[piece.name].append((piece.start, piece.numel, rank, number, piece.offset))
        for name, pieces in where.items():
            pieces.sort()
            ends = [0, *(start + numel for start, numel, *_ in pieces)]
            if [start for start, *_ in pieces] != ends[:-1] or ends[-1] != self.shapes[name].numel():
                raise CheckpointError(f"{self._folder}: the shards do not make up {name} exactly")
        return where

    def _check_mapping(self, rank: int, number: int) -> None:
        """Stages 1 and 2 write down which parameters lie where."""
        if self.topology.zero_stage == 3:
            return
        written = self._ranks[rank][0]["param_slice_mappings"][number]
        ours = {piece.name: (piece.numel, piece.offset) for piece in self._layout.ranks[rank][number].pieces}
        if {name: (address.numel, address.start) for name, address in written.items()} != ours:
            raise CheckpointError(f"{self._folder}: rank {rank} lays its parameters out in a way that this version "
                                  "does not know")

    def pieces(self, kind: str, name: str, start: int, stop: int) -> Iterator[Tensor]:
        for begin, numel, rank, number, offset in self._where[name]:
            low, high = max(begin, start), min(begin + numel, stop)
            if low < high:
                yield self._flat(kind, rank, number)[offset + low - begin:offset + high - begin]

    def _flat(self, kind: str, rank: int, number: int) -> Tensor:
        state, progress = self._ranks[rank]
        if kind == AVERAGE:
            return progress["ema"][number]
        if kind == WEIGHTS:
            return fp32(state, self.topology.zero_stage)[number].detach()
        return adam(state, self.topology.zero_stage)["state"][number][kind]
