"""A run's folder with nothing but its model."""

from dataclasses import replace
from pathlib import Path

from tests.model.small import small_model
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
    model = small_model(run.model)
    write_model(folder / "model", run, model.state_dict(), vocabulary.path, {"step": 4, "weights": "averaged"})
    return folder
