"""DeepSpeed's universal checkpoints: every parameter whole, in files of its own. Written so that DeepSpeed 0.19.8 loads
them; what it does not know (the average, the run's progress) lies beside, where it does not look.

    zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt    zero/optimizer_state.pt    mp_rank_00_model_states.pt
    average/NAME.pt    training.pt    config/                    (the three of which are ours)
"""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch
from deepspeed import __version__ as version
from deepspeed.checkpoint.constants import EP_IS_EXPERT_PARAM, EP_NUM_EXPERTS
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch import Tensor
from tqdm import tqdm

from model.moe.layer import MoELayer
from tools.conversion.configuration import read_configuration, write_configuration
from tools.conversion.files import fill, load, scratch
from tools.conversion.layout import empty_model
from tools.conversion.sharded import model_states_file
from tools.conversion.source import AVERAGE, MOMENTS, WEIGHTS, Source, TrainingFacts
from trainer.errors import CheckpointError

TRAINING = "training.pt"
_VERSION = 0.4  # of the layout


def write_universal(folder: Path, source: Source, vocabulary: Path | None) -> None:
    """Writes a training state as a universal checkpoint."""
    facts = source.training
    experts = {f"{path}.experts.{name}": layer.experts.w1.shape[0]
               for path, layer in empty_model(source.run.model).named_modules() if isinstance(layer, MoELayer)
               for name, _ in layer.experts.named_parameters()}
    for name in tqdm(source.shapes, desc="writing", unit="parameter"):
        place = folder / "zero" / name
        place.mkdir(parents=True)
        more = {EP_IS_EXPERT_PARAM: True, EP_NUM_EXPERTS: experts[name]} if name in experts else {}
        for kind in (WEIGHTS, *MOMENTS):
            torch.save({"param": _copy(source, kind, name, folder), "cat_dim": 0, **more}, place / f"{kind}.pt")
        torch.save(facts.adam_step, place / "step.pt")
        if AVERAGE in source.kinds:
            (folder / AVERAGE).mkdir(exist_ok=True)
            torch.save(_copy(source, AVERAGE, name, folder), folder / AVERAGE / f"{name}.pt")
    groups = [{**facts.hyper, "params": [0]}]
    torch.save({**facts.scaler, "clip_grad": facts.ds_config["gradient_clipping"], "ds_version": version,
                "zero_stage": ZeroStageEnum(facts.ds_config["zero_optimization"]["stage"]), "param_groups": groups,
                "optimizer_state_dict": {"state": {0: {"step": facts.adam_step}}, "param_groups": groups}},
               folder / "zero" / "optimizer_state.pt")
    _write_model_states(folder, source)
    state = {**{field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)}, "step": source.step,
             "kinds": source.kinds, "buffers": source.buffers}
    torch.save(state, folder / TRAINING)
    write_configuration(folder, source.run, vocabulary)


def _write_model_states(folder: Path, source: Source) -> None:
    """Without weights, which DeepSpeed takes from `zero`."""
    facts = source.training
    torch.save({"module": OrderedDict(source.buffers), "buffer_names": list(source.buffers), "optimizer": None,
                "param_shapes": [OrderedDict(source.shapes)], "lr_scheduler": None, **facts.counters,
                "dp_world_size": 1, "mp_world_size": 1, "ds_config": facts.ds_config, "ds_version": version,
                "universal_checkpoint_info": {"universal_checkpoint_version": _VERSION}},
               folder / model_states_file(1, 0))
    os.link(folder / model_states_file(1, 0), folder / model_states_file(3, 0))  # stage 3 looks for another name


def _copy(source: Source, kind: str, name: str, folder: Path) -> Tensor:
    shape = source.shapes[name]
    out = scratch(shape.numel(), torch.float32, folder)
    return fill(out, source.pieces(kind, name, 0, shape.numel())).view(shape)


class UniversalCheckpoint(Source):
    """What `write_universal` wrote."""

    def __init__(self, folder: Path):
        self._folder = folder
        state = load(folder / TRAINING)
        self.step, self.kinds, self.buffers = state.pop("step"), state.pop("kinds"), state.pop("buffers")
        self.training = TrainingFacts(**state)
        vocab_size = load(folder / "zero" / "embedding" / f"{WEIGHTS}.pt")["param"].shape[0]
        self.run, self.vocabulary = read_configuration(folder, vocab_size)
        self.shapes = {name: parameter.shape for name, parameter in empty_model(self.run.model).named_parameters()}
        found = {path.name for path in (folder / "zero").iterdir() if path.is_dir()}
        if found != self.shapes.keys():
            raise CheckpointError(f"{folder}: does not hold this run's parameters: without "
                                  f"{sorted(self.shapes.keys() - found)[:3]}, but with "
                                  f"{sorted(found - self.shapes.keys())[:3]}")
        for name, shape in self.shapes.items():
            for kind in self.kinds:
                if (value := self._read(kind, name)).shape != shape:
                    raise CheckpointError(f"{folder}: {kind} of {name} has shape {list(value.shape)}, where its "
                                          f"configuration says {list(shape)}")

    def pieces(self, kind: str, name: str, start: int, stop: int) -> Iterator[Tensor]:
        yield self._read(kind, name).flatten()[start:stop]

    def _read(self, kind: str, name: str) -> Tensor:
        if kind == AVERAGE:
            return load(self._folder / AVERAGE / f"{name}.pt")
        return load(self._folder / "zero" / name / f"{kind}.pt")["param"]
