"""What lies beside the tensors of a checkpoint: the run's configuration and its vocabulary."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from model.errors import ConfigError
from tools.conversion.source import Source
from trainer import config_load
from trainer.config import RunConfig, to_toml
from trainer.data.vocabulary import Vocabulary
from trainer.errors import CheckpointError

FOLDER = Path("config")
"""Where runs and converted checkpoints keep both."""


def write_configuration(folder: Path, run: RunConfig, vocabulary: Path | None) -> None:
    """Writes both into the folder's own `config`."""
    (folder / FOLDER).mkdir()
    (folder / FOLDER / "run.toml").write_text(to_toml(run))
    if vocabulary is not None:
        shutil.copyfile(vocabulary, folder / FOLDER / "vocabulary.model")


def read_configuration(checkpoint: Path, vocab_size: int) -> tuple[RunConfig, Path | None]:
    """The configuration of a checkpoint's run, with the vocabulary's size filled in, and its vocabulary if it is kept.
    They lie in the checkpoint itself if it was converted, else in its run's folder."""
    places = (checkpoint / FOLDER, checkpoint.absolute().parent.parent / FOLDER)
    for place in places:
        if (place / "run.toml").is_file():
            run = config_load.load(file=place / "run.toml")
            vocabulary = place / "vocabulary.model"
            return (replace(run, model=replace(run.model, vocab_size=vocab_size)),
                    vocabulary if vocabulary.is_file() else None)
    raise CheckpointError(f"{checkpoint} is of an unknown run: there is neither {places[0] / 'run.toml'} nor "
                          f"{places[1] / 'run.toml'}. Convert it where its run wrote it")


def with_vocabulary(source: Source, named: Path | None) -> tuple[RunConfig, Path]:
    """The source's run with the special tokens of its vocabulary, and the vocabulary's file. named: by the user.
    ConfigError if there is none, or it cannot be this model's."""
    path = named or source.vocabulary
    if path is None:
        raise ConfigError("--vocabulary", "is needed: the run kept no vocabulary of its own. Name its .model file")
    vocabulary = Vocabulary(path)
    rows = source.run.model.vocab_size
    if vocabulary.size != rows:
        raise ConfigError("--vocabulary", f"{path} has {vocabulary.size} pieces, but the model has embeddings for "
                          f"{rows}: name the vocabulary that it was trained with")
    model = replace(source.run.model, pad_id=vocabulary.pad_id, eos_id=vocabulary.eos_id, bos_id=vocabulary.bos_id)
    return replace(source.run, model=model), path
