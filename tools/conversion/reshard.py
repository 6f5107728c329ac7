"""Writes a training checkpoint for any number of ranks, expert shards and ZeRO stage, one file after the other, as
DeepSpeed 0.19.8 writes its own: a run resumes from it by the ordinary path."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import torch
from deepspeed import __version__ as version
from deepspeed.checkpoint.constants import DS_AUTOEP_UC_META
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor
from tqdm import tqdm

from model.errors import ConfigError
from model.moe.layer import MoELayer
from tools.conversion.configuration import write_configuration
from tools.conversion.files import fill, scratch
from tools.conversion.layout import Layout, Partition, Topology, empty_model
from tools.conversion.sharded import model_states_file, optimizer_states_file
from tools.conversion.source import AVERAGE, MOMENTS, WEIGHTS, Source, TrainingFacts
from trainer import checkpoint
from trainer.ds_config import resolve
from trainer.engine import TAG, rank_file
from trainer.topology import check_topology, zero_layout

_FORMATS = {1: ("per_expert_files", None), 2: ("per_expert_files", None), 3: ("zero3_partitioned", 1)}
_EXPERTS = r".*\.experts\.w[123]$"
_VERSION = 0.4  # of the universal layout that this version of DeepSpeed writes


def write_checkpoint(folder: Path, source: Source, topology: Topology, vocabulary: Path | None) -> dict[str, int]:
    """Writes the folder and its manifest. Returns the micro-batch and accumulation that keep the rows of a step.

    ConfigError where the experts or the rows cannot be divided like that, or DeepSpeed cannot shard such experts.
    """
    return _Writer(folder, source, topology).write(vocabulary)


class _Writer:
    def __init__(self, folder: Path, source: Source, topology: Topology):
        self.folder, self.source, self.topology = folder, source, topology
        self.facts: TrainingFacts = source.training
        self.batches = _batches(self.facts, topology.world)
        ds = self.facts.ds_config
        self.ds_config = {**ds, **self.batches, "zero_optimization": {**ds["zero_optimization"],
                                                                      "stage": topology.zero_stage},
                          "train_batch_size": self.facts.rows_per_step}
        run = source.run
        self.run = replace(run, train=replace(run.train, expert_parallel_size=topology.expert_parallel_size))
        values = {key: value for key, value in self.ds_config.items() if key != "train_batch_size"}
        check_topology(self.run, resolve(values, folder), topology.world)
        self.layout = Layout(run.model, topology, self.ds_config["zero_optimization"], run.optim.weight_decay)
        self.common = {"ds_config": self.ds_config, "ds_version": version}

    def write(self, vocabulary: Path | None) -> dict[str, int]:
        (self.folder / TAG).mkdir(parents=True)
        for rank in tqdm(range(self.topology.world), desc="writing", unit="rank"):
            self._save(f"{TAG}/{optimizer_states_file(rank, self.facts.dtype)}",
                       {"optimizer_state_dict": self._optimizer_state(rank), **self.common})
            average = [self._flat(AVERAGE, part) for part in self.layout.ranks[rank]] \
                if AVERAGE in self.source.kinds else []
            self._save(rank_file(rank), {"ema": average, "updates": self.facts.updates,
                                         "random": self.facts.random[rank % len(self.facts.random)]})
            if rank == 0 or self.topology.zero_stage == 3:
                self._save(f"{TAG}/{model_states_file(self.topology.zero_stage, rank)}", self._model_state(rank))
        if self.topology.zero_stage < 3 and self.topology.expert_parallel_size > 1:
            self._write_experts()
        write_configuration(self.folder, self.run, vocabulary)
        checkpoint.seal(self.folder, {**self.facts.manifest, "step": self.source.step, "topology": {
            **vars(self.topology), "rows_per_step": self.facts.rows_per_step,
            **zero_layout(self.ds_config["zero_optimization"])}})
        return self.batches

    def _save(self, name: str, state: object) -> None:
        torch.save(state, self.folder / name)

    def _flat(self, kind: str, partition: Partition) -> Tensor:
        out = scratch(partition.numel, torch.float32, self.folder)
        for piece in partition.pieces:
            fill(out[piece.offset:], self.source.pieces(kind, piece.name, piece.start, piece.start + piece.numel))
        return out

    def _optimizer_state(self, rank: int) -> dict:
        partitions = self.layout.ranks[rank]
        weights = [self._flat(WEIGHTS, part) for part in partitions]
        step = self.facts.adam_step
        adam = {"state": {number: {"step": step.clone() if torch.is_tensor(step) else step,
                                   **{kind: self._flat(kind, part) for kind in MOMENTS}}
                          for number, part in enumerate(partitions)},
                "param_groups": [{**group, **self.facts.hyper,
                                  "params": [n for n, part in enumerate(partitions) if part.group == number]}
                                 for number, group in enumerate(self.layout.groups)]}
        if self.topology.zero_stage == 3:
            sharded = {"ds_zero_partition_groups": [_zero3_group(n, part, rank, self.layout.groups)
                                                    for n, part in enumerate(partitions)]}
            return {"zero_stage": ZeroStageEnum.weights, **self.facts.scaler, "partition_count": self.topology.world,
                    **(sharded if self.topology.expert_parallel_size > 1 else {}),
                    "optimizer_state_dict": adam, "fp32_flat_groups": weights}
        return {**self.facts.scaler, "clip_grad": self.ds_config["gradient_clipping"], "base_optimizer_state": adam,
                "single_partition_of_fp32_groups": [flat[:part.numel - part.filler]
                                                    for flat, part in zip(weights, partitions, strict=True)],
                "zero_stage": ZeroStageEnum(self.topology.zero_stage),
                "group_paddings": [part.filler for part in partitions],
                "param_alignment_paddings": [[0] * len(part.shapes) for part in partitions],
                "partition_count": [len(part.holders) for part in partitions], "ds_version": version,
                "param_slice_mappings": [OrderedDict((piece.name, fragment_address(numel=piece.numel,
                                                                                   start=piece.offset))
                                                     for piece in part.pieces) for part in partitions]}

    def _model_state(self, rank: int) -> dict:
        shards = self.topology.expert_parallel_size
        model = empty_model(self.source.run.model, shards, rank % shards)
        layers = _expert_layers(model, rank, self.topology) if shards > 1 else []
        elsewhere = {name for layer in layers for name in layer["affine_maps"]["params"]}
        module = OrderedDict((name, self._module_tensor(name)) for name in model.state_dict() if name not in elsewhere)
        frozen = OrderedDict() if self.topology.zero_stage > 1 else None
        state = {"module": module, "buffer_names": list(self.source.buffers), "optimizer": None,
                 "param_shapes": [OrderedDict(part.shapes) for part in self.layout.ranks[rank]],
                 "frozen_param_shapes": frozen, "shared_params": {}, "frozen_param_fragments": frozen,
                 "lr_scheduler": None, "data_sampler": None, "random_ltd": None, **self.facts.counters,
                 "dp_world_size": self.topology.world, "mp_world_size": 1,
                 "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1}, **self.common}
        if layers:
            state |= {"num_experts": [layer["num_experts"] for layer in layers], "ds_autoep_layers": layers,
                      "universal_checkpoint_info": {"universal_checkpoint_version": _VERSION,
                                                    "expert_parameter_patterns": [_EXPERTS],
                                                    "ds_autoep_layers": layers}}
        return state

    def _module_tensor(self, name: str) -> Tensor:
        if name in self.source.buffers:
            return self.source.buffers[name]
        if self.topology.zero_stage == 3:
            return torch.empty(0, dtype=self.facts.dtype)
        shape = self.source.shapes[name]
        out = scratch(shape.numel(), self.facts.dtype, self.folder)
        return fill(out, self.source.pieces(WEIGHTS, name, 0, shape.numel())).view(shape)

    def _write_experts(self) -> None:
        """Stages 1 and 2 keep the weights that an expert computes with in a file of its own."""
        model = empty_model(self.source.run.model, self.topology.expert_parallel_size)
        layers = _expert_layers(model, 0, self.topology)
        for number, layer in enumerate(layers):
            for expert in range(layer["num_experts"]):
                state = {}
                for name in layer["affine_maps"]["params"]:
                    shape = self.source.shapes[name]
                    size = shape[1:].numel()
                    parts = list(self.source.pieces(WEIGHTS, name, expert * size, (expert + 1) * size))
                    state[f"{name}.{expert}"] = torch.cat(parts).view(shape[1:]).to(self.facts.dtype)
                self._save(f"{TAG}/layer_{number}_expert_{expert}_mp_rank_00_model_states.pt", state)


def _batches(facts: TrainingFacts, world: int) -> dict[str, int]:
    """Micro-batch and accumulation for as many rows a step as before: the accumulation stays if it can."""
    rows, accumulation = facts.rows_per_step, facts.ds_config["gradient_accumulation_steps"]
    if rows % world:
        raise ConfigError("--world", f"is {world}, but must divide the {rows} rows of a step, which decide what a step "
                          "computes: choose a divisor, or begin a new run from the exported model with --init_from")
    share = rows // world
    accumulation = accumulation if share % accumulation == 0 else 1
    return {"train_micro_batch_size_per_gpu": share // accumulation, "gradient_accumulation_steps": accumulation}


def _zero3_group(number: int, partition: Partition, rank: int, groups: list[dict]) -> dict:
    moe = partition.moe
    return {"sub_group": number, "partition_count": len(partition.holders),
            "partition_rank": partition.holders.index(rank), "partition_ranks": list(partition.holders),
            "families": ["autoep_expert" if moe else "replicated"],
            "group_names": [groups[partition.group]["name"] if moe else "replicated"]}


def _expert_layers(model: torch.nn.Module, rank: int, topology: Topology) -> list[dict]:
    """What DeepSpeed's model states say of each layer with sharded experts."""
    shards, found = topology.expert_parallel_size, []
    for path, layer in model.named_modules():
        if not isinstance(layer, MoELayer):
            continue
        held, shard = layer.num_local_experts, rank % shards
        form, form_version = _FORMATS[topology.zero_stage]
        maps = {f"{path}.experts.{name}": getattr(weight, DS_AUTOEP_UC_META)["affine_map"]
                for name, weight in layer.experts.named_parameters()}
        found.append({
            "moe_layer_id": len(found), "module_path": path, "num_experts": layer.num_experts,
            "num_local_experts": held, "ep_size": shards, "expert_placement": layer.expert_placement_descriptor,
            "affine_maps": {"version": 1, "params": maps}, "expert_key_prefix": f"{path}.experts",
            "checkpoint_format": form, "checkpoint_format_version": form_version,
            "ep_group_name": layer.ep_group_name, "ep_rank": shard, "expert_data_parallel_rank": rank // shards,
            "expert_data_parallel_world_size": topology.world // shards,
            "global_expert_start": shard * held, "global_expert_end": (shard + 1) * held})
    return found
