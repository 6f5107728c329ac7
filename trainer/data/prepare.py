"""From a DataConfig to a vocabulary and tokenized corpora."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from model.errors import ConfigError
from trainer.data.config import DataConfig
from trainer.data.corpus import REPOSITORY, Corpus, find_corpus
from trainer.data.packing import Samples
from trainer.data.token_cache import TokenCache, open_token_cache
from trainer.data.vocabulary import TRAINING_CHARACTERS, Vocabulary, train_vocabulary

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class PreparedData:
    """The vocabulary, and the tokenized corpus of each split that was asked for and configured."""

    config: DataConfig
    vocabulary: Vocabulary
    caches: dict[str, TokenCache]

    def samples(self, split: str, draws: int | None = None) -> Samples:
        """A split's samples with the configuration's lengths.

        With `draws` other than data.draws_per_source the rows are longer or shorter by as many canvases, so that
        documents keep the sources they have in training.
        """
        config = self.config
        draws = draws or config.draws_per_source
        more = (draws - config.draws_per_source) * config.max_target_tokens
        return Samples(self.caches[split], max_source_tokens=config.max_source_tokens,
                       max_target_tokens=config.max_target_tokens, row_tokens=config.row_tokens + more,
                       draws=draws)


def prepare(config: DataConfig, *, splits: tuple[str, ...] = SPLITS, progress: bool = False) -> PreparedData:
    """Trains the vocabulary and tokenizes the corpora, or finds both in `config.cache_dir`.

    Every rank may call this at once: one works, the others wait. With `progress` on all ranks, the one that
    works shows a bar. Raises ConfigError and DataError.
    """
    config.validate()
    corpora = {split: find_corpus(getattr(config, split), split, config)
               for split in splits if getattr(config, split)}
    try:
        Path(config.cache_dir).mkdir(parents=True, exist_ok=True)
        vocabulary = open_vocabulary(config, corpora.get("train"))
        caches = {split: open_token_cache(corpus, vocabulary, config.cache_dir, progress=progress)
                  for split, corpus in corpora.items()}
    except OSError as error:  # documents that cannot be read are DataErrors
        raise ConfigError("data.cache_dir", f"{config.cache_dir} cannot be written: {error.strerror or error}. Make "
                          "room, or give another folder") from error
    return PreparedData(config, vocabulary, caches)


def open_vocabulary(config: DataConfig, train: Corpus | None = None) -> Vocabulary:
    """The vocabulary that the configuration names, trained first where it says so."""
    if config.vocabulary != "train":
        path = Path(config.vocabulary).expanduser()
        shipped = REPOSITORY / path
        return Vocabulary(shipped if shipped.exists() and not path.exists() else path)
    corpus = train or find_corpus(config.train, "train", config)
    key = hashlib.sha256(f"{corpus.digest} {config.vocab_size} {TRAINING_CHARACTERS}".encode()).hexdigest()
    path = Path(config.cache_dir).absolute() / "vocabularies" / f"{key[:24]}.model"
    return train_vocabulary(corpus.texts(), path, config.vocab_size)
