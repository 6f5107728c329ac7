"""A run's folder with nothing but its model."""

from dataclasses import replace
from pathlib import Path

import torch

from model.diffusion_lm import DiffusionLM
from tests.trainer.launching import SMALL, write_corpus
from trainer.config_load import load
from trainer.data.prepare import prepare
from trainer.export import write_model


def exported_run(folder: Path, recipe: str = "", **settings) -> Path:
    """A small model whose weights are as far from their start as after training. settings: of the run, with __ for
    dots."""
    settings = {**SMALL, **write_corpus(folder), **{key.replace("__", "."): value for key, value in settings.items()}}
    settings["data.test"] = settings["data.valid"]
    run = load("tiny", recipe=recipe, overrides=[f"{key}={value}" for key, value in settings.items()])
    vocabulary = prepare(run.data, splits=("train",)).vocabulary
    run = replace(run, model=replace(run.model, vocab_size=vocabulary.size))
    model = DiffusionLM(run.model)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.prior_count_V.copy_(torch.arange(vocabulary.size) * 7 % 23)
    write_model(folder / "model", run, model.state_dict(), vocabulary.path, {"step": 4, "weights": "averaged"})
    return folder
