"""Models without a training state: reads exported ones and the original DiffuSeq's, writes safetensors and exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.diffuseq_import import original_config, uniform_prior, used
from model.errors import ConfigError
from tools.conversion.files import Tensors, load, write_safetensors
from tools.conversion.layout import empty_model
from tools.conversion.mapping import Rule, check
from tools.conversion.source import WEIGHTS, Source
from trainer import config_load
from trainer.config import RunConfig, to_dict
from trainer.ds_config import read_json
from trainer.errors import CheckpointError
from trainer.export import INDEX, read_config, weight_files

_NEEDED = ("vocab", "vocab_size", "seq_len", "config_name", "hidden_dim", "hidden_t_dim", "noise_schedule",
           "diffusion_steps", "dropout")
"""What must be known of an original's run."""


class ExportedModel(Source):
    """A run's `model` folder, or one that was converted; Hugging Face folders among them."""

    kinds = (WEIGHTS,)

    def __init__(self, folder: Path):
        config = read_config(folder)
        self.run = config_load.from_dict(config["run"], str(folder / "config.json"))
        self.step, self.weights = config.get("step"), config.get("weights")
        self.vocabulary = folder / "vocabulary.model"
        self._file_of = {}
        for path in weight_files(folder):
            try:
                file = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
            if twice := self._file_of.keys() & file.keys():
                raise CheckpointError(f"{path} holds tensors that another file of {folder} holds too: "
                                      f"{', '.join(sorted(twice)[:5])}")
            self._file_of |= dict.fromkeys(file.keys(), file)
        buffers = {name for name, _ in empty_model(self.run.model).named_buffers()}
        self.shapes = {name: torch.Size(self._file_of[name].get_slice(name).get_shape())
                       for name in sorted(self._file_of.keys() - buffers)}
        self.buffers = {name: self._file_of[name].get_tensor(name) for name in sorted(self._file_of.keys() & buffers)}

    def pieces(self, kind: str, name: str, start: int, stop: int) -> Iterator[Tensor]:
        yield self._file_of[name].get_tensor(name).flatten()[start:stop]


class OriginalDiffuSeq(Source):
    """A `.pt` file of DiffuSeq or DiffuSeq-v2, with its run's training_args.json and BERT configuration beside it.

    table: which embeddings, `live` or `averaged`; the other table is not used. The file's name says step and kind of
    weights.
    """

    kinds = (WEIGHTS,)
    vocabulary = None

    def __init__(self, path: Path, table: str):
        step = re.search(r"(\d+)\.pt$", path.name)
        self.step, self.weights = int(step[1]) if step else None, "averaged" if path.name.startswith("ema") else "last"
        arguments = read_json(path.parent / "training_args.json", "FROM")
        lacking = [key for key in _NEEDED if key not in arguments]
        if lacking:
            raise CheckpointError(f"{path.parent / 'training_args.json'} lacks {', '.join(lacking)}")
        run = config_load.load(recipe="diffuseq")
        data = replace(run.data, max_source_tokens=arguments["seq_len"] // 2,
                       max_target_tokens=arguments["seq_len"] // 2, row_tokens=arguments["seq_len"])
        model = original_config(arguments, _bert(path.parent, arguments))
        if model.head_dim % 8:  # too narrow for the fast backends
            model = replace(model, attention=replace(model.attention, backend="reference"))
        train = replace(run.train, steps=arguments.get("learning_steps", run.train.steps))
        self.run = replace(run, preset="", data=data, model=model, train=train)
        state = load(path)
        if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
            raise CheckpointError(f"{path} is none of DiffuSeq's checkpoints: it must hold tensors by name")
        self._state = used(state, table)
        self.shapes = {name: value.shape for name, value in self._state.items()}
        self.buffers = uniform_prior(self.run.model)

    def pieces(self, kind: str, name: str, start: int, stop: int) -> Iterator[Tensor]:
        yield self._state[name].flatten()[start:stop]


def _bert(folder: Path, arguments: dict) -> dict:
    """The BERT configuration that the original took from the hub by the name `config_name`."""
    for name in (f"{arguments['config_name']}.json", "bert_config.json", "config.json"):
        if (folder / name).is_file():
            return read_json(folder / name, "FROM")
    raise ConfigError("FROM", f"{folder} needs the config.json of {arguments['config_name']}, whose sizes the network "
                      "has: put it there as bert_config.json")


def tensors_of(source: Source, run: RunConfig, rules: list[Rule], kind: str, dtype: torch.dtype) -> Tensors:
    """The tensors of the model that `run` describes, each by its rule; CheckpointError unless the rules fit both."""
    targets = empty_model(run.model).state_dict()
    made = {rule.target: rule for rule in rules}
    check(rules, source.shapes, targets.keys() - source.buffers.keys())
    for rule in rules:
        if rule.combine is None and source.shapes[rule.sources[0]] != targets[rule.target].shape:
            raise CheckpointError(f"{rule.target} has shape {list(source.shapes[rule.sources[0]])}, where its "
                                  f"configuration says {list(targets[rule.target].shape)}")
    tensors = {name: (value.dtype, value.shape, iter([value.flatten()])) for name, value in source.buffers.items()}
    return tensors | {name: (dtype, targets[name].shape, made[name].pieces(source, kind)) for name in sorted(made)}


def write_shards(folder: Path, tensors: Tensors, shard_bytes: int) -> None:
    """Writes the weights as Hugging Face does: files of at most so many bytes (a larger tensor has one of its own) and
    an index of them; a single file without one if all fit."""
    shapes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape, _) in tensors.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_bytes)
    for filename, names in split.filename_to_tensors.items():
        write_safetensors(folder / filename, {name: tensors[name] for name in names}, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def metadata_of(run: RunConfig, facts: dict) -> dict[str, str]:
    """What a file of weights says of itself, so that it can be read without its run."""
    return {"run": json.dumps(to_dict(run)), **{key: str(value) for key, value in facts.items()}}
