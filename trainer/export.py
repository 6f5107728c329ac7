"""A finished model as a folder: config.json, model.safetensors (or several files and their index), vocabulary.model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ModelConfig
from model.diffusion_lm import DiffusionLM
from model.moe.parallel import part_of_state
from trainer.config import RunConfig, to_dict
from trainer.config_load import from_dict
from trainer.data.vocabulary import Vocabulary
from trainer.errors import CheckpointError
from trainer.kernels import DTYPES

WEIGHTS_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file of weights; where there are several, what says which tensor lies in which (Hugging Face's form)."""


def write_model(folder: Path, run: RunConfig, state: dict[str, Tensor], vocabulary: Path, facts: dict) -> None:
    """Writes the folder beside its place and moves it there, so that a reader never meets half of it."""
    temporary = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = temporary / WEIGHTS_FILE
    save_file({name: value.contiguous() for name, value in state.items()}, weights)
    weights.chmod(0o644)  # safetensors lets nobody else read it
    describe_model(temporary, run, vocabulary, facts)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def describe_model(folder: Path, run: RunConfig, vocabulary: Path, facts: dict) -> None:
    """Writes what an exported model's folder holds beside its weights."""
    (folder / "config.json").write_text(json.dumps({"run": to_dict(run), **facts}, indent=1))
    shutil.copyfile(vocabulary, folder / "vocabulary.model")


def model_folder(path: Path) -> Path:
    """`path` if it is an exported model, or the model inside it if it is a finished run's folder."""
    return path / "model" if (path / "model").is_dir() else path


def read_model(folder: Path, device: torch.device | str = "cpu",
               dtype: str = "fp32") -> tuple[DiffusionLM, Vocabulary, RunConfig]:
    """The model in evaluation mode, its vocabulary and the configuration of the run that made it.

    dtype: of weights and activations, as `inference_dtype` takes it. Kernels are those that suit the device,
    whatever the run was trained with: the weights do not depend on them.
    """
    run, vocabulary = read_description(folder)
    model = DiffusionLM(_with_kernels_of_any_device(run.model))
    load_weights(model, folder)
    return model.to(device, DTYPES[inference_dtype(dtype, device)]).eval(), vocabulary, run


def inference_dtype(dtype: str, device: torch.device | str) -> str:
    """A key of DTYPES as it is; `auto` as bf16 on a GPU that computes in it, which the fast kernels need, and as fp32
    elsewhere."""
    if dtype != "auto":
        return dtype
    on_gpu = torch.device(device).type == "cuda"
    return "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def _with_kernels_of_any_device(config: ModelConfig) -> ModelConfig:
    attention, moe = config.attention, config.moe
    if attention.backend != "reference":  # which runs everywhere, and alone takes heads of any width
        attention = replace(attention, backend="auto")
    return replace(config, attention=attention, moe=replace(moe, backend="auto"))


def read_description(folder: Path) -> tuple[RunConfig, Vocabulary]:
    """The configuration of the run that made a model, and its vocabulary, without the weights."""
    missing = [name for name in ("config.json", "vocabulary.model") if not (folder / name).is_file()]
    if not (folder / INDEX).is_file() and not (folder / WEIGHTS_FILE).is_file():
        missing.append(WEIGHTS_FILE)
    if missing:
        raise CheckpointError(f"{folder} is no exported model: it has no {', '.join(missing)}. A finished run keeps "
                              "its model in RUN/model; of another, make one from its checkpoints: python "
                              f"tools/convert_checkpoint.py {folder} TO --format model")
    run = from_dict(read_config(folder)["run"], str(folder / "config.json"))
    vocabulary = Vocabulary(folder / "vocabulary.model")
    if vocabulary.size != run.model.vocab_size:
        raise CheckpointError(f"{vocabulary.path} has {vocabulary.size} pieces, but the model has embeddings for "
                              f"{run.model.vocab_size}: put the vocabulary there that it was trained with")
    return run, vocabulary


def read_config(folder: Path) -> dict:
    """config.json: the configuration of the `run`, `step`, `weights`. CheckpointError if it is not that."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("run"), dict):
        raise CheckpointError(f"{path} says nothing of a run: this is no model of this program")
    return config


def load_weights(model: DiffusionLM, folder: Path) -> None:
    """Copies a folder's weights into a model, of sharded experts its own part; every name and shape must match."""
    files = weight_files(folder)
    state: dict[str, Tensor] = {}
    for path in files:
        try:
            state |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        model.load_state_dict(part_of_state(model, state))
    except RuntimeError as error:
        raise CheckpointError(f"{files[0]} does not fit this model: {' '.join(str(error).split())}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights. CheckpointError if what says so cannot be read."""
    index = folder / INDEX
    if not index.is_file():
        return [folder / WEIGHTS_FILE]
    try:
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error!r}") from error
