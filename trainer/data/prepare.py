"""From a DataConfig to a vocabulary and tokenized corpora."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from model.errors import ConfigError
from trainer.data.config import DataConfig
from trainer.data.corpus import REPOSITORY, Corpus, find_corpus
from trainer.data.packing import Samples
from trainer.data.records import Reader, texts
from trainer.data.token_cache import TokenCache, is_token_cache, open_token_cache
from trainer.data.vocabulary import TRAINING_CHARACTERS, Vocabulary, train_vocabulary
from trainer.data.workers import local_workers
from trainer.errors import DataError

SPLITS = ("train", "valid", "test")
VOCABULARY = "vocabulary.model"
"""Name of the vocabulary in a folder of tokenized corpora."""

PREPARED_WITH, CONFIGURATION = "settings.json", "data.toml"
"""What such a folder says of itself: how tools/prepare_data.py was asked for it, and how to train on it."""

Source = Corpus | Path
"""Documents to tokenize, or the folder of a tokenized corpus."""


@dataclass(frozen=True)
class PreparedData:
    """The vocabulary, and the tokenized corpora of each split that was asked for and configured."""

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
                       draws=draws, weights={name: part.weight for name, part in config.corpora(split).items()})


def prepare(config: DataConfig, *, splits: tuple[str, ...] = SPLITS, progress: bool = False,
            reader: Reader | None = None) -> PreparedData:
    """Trains the vocabulary and tokenizes the corpora, or finds both in `config.cache_dir`.

    Every rank may call this at once: one works, the others wait. With `progress` on all ranks, the one that
    works shows a bar. reader: in place of the configuration's fields. Raises ConfigError and DataError.
    """
    config.validate()
    found = {split: find_sources(config, split, reader) for split in splits if config.corpora(split)}
    try:
        Path(config.cache_dir).mkdir(parents=True, exist_ok=True)
        vocabulary = open_vocabulary(config, found.get("train"))
        with local_workers(config.workers) as workers:
            folders = {split: [source if isinstance(source, Path) else open_token_cache(
                source, vocabulary, config.cache_dir, workers=workers, progress=progress).folders[0]
                for source in sources] for split, sources in found.items()}
    except OSError as error:  # documents that cannot be read are DataErrors
        raise ConfigError("data.cache_dir", f"{config.cache_dir} cannot be written: {error.strerror or error}. Make "
                          "room, or give another folder") from error
    caches = {split: TokenCache(*paths) for split, paths in folders.items()}
    for split, cache in caches.items():
        if cache.vocabulary != vocabulary.digest:
            raise ConfigError("data.vocabulary", f"{vocabulary.path} is not what data.{split} was tokenized with: name "
                              f"the {VOCABULARY} that was made with {cache.name}")
    return PreparedData(config, vocabulary, caches)


def find_sources(config: DataConfig, split: str, reader: Reader | None = None) -> list[Source]:
    """The corpora of a split, in the order of the configuration; reader: in place of its fields. Raises DataError
    where nothing is there."""
    sources = []
    for name, corpus in config.corpora(split).items():
        key = f"data.{split}.{name}.documents" if isinstance(getattr(config, split), dict) else f"data.{split}"
        folder = _tokenized(corpus.documents, split, key)
        sources.append(folder or find_corpus(corpus, split, config.cache_dir, key, reader))
    return sources


def _tokenized(documents: str | list[str], split: str, key: str) -> Path | None:
    """The folder of a tokenized corpus, if `documents` is one, or is a folder with one for each split. DataError for a
    prepared folder where the one that is meant is missing or damaged: its other files are no documents."""
    if not isinstance(documents, str):
        return None
    path = Path(documents).expanduser()
    places = [place for folder in (path, REPOSITORY / path) for place in (folder, folder / split)]
    found = next((place for place in places if is_token_cache(place)), None)
    for place in places if found is None else ():
        if place.name in SPLITS and _is_prepared(place.parent):
            raise DataError(f"{key}: {place.parent} has no whole {place.name} split: make it with "
                            "tools/prepare_data.py, or name another")
    return found


def _is_prepared(folder: Path) -> bool:
    """Whether tools/prepare_data.py made it."""
    return all((folder / name).is_file() for name in (PREPARED_WITH, CONFIGURATION))


def open_vocabulary(config: DataConfig, train: list[Source] | None = None) -> Vocabulary:
    """The vocabulary that the configuration names, trained first where it says so and `train` (by default what the
    configuration names) is not tokenized yet."""
    if config.vocabulary != "train":
        path = Path(config.vocabulary).expanduser()
        shipped = REPOSITORY / path
        return Vocabulary(shipped if shipped.exists() and not path.exists() else path)
    sources = train or find_sources(config, "train")
    tokenized = [source for source in sources if isinstance(source, Path)]
    if tokenized:
        return Vocabulary(tokenized[0].parent / VOCABULARY)
    digests = " ".join(corpus.digest for corpus in sources)
    key = hashlib.sha256(f"{digests} {config.vocab_size} {TRAINING_CHARACTERS}".encode()).hexdigest()
    path = Path(config.cache_dir).absolute() / "vocabularies" / f"{key[:24]}.model"
    return train_vocabulary((text for corpus in sources for text in texts(corpus.blocks(), corpus.reader)), path,
                            config.vocab_size)
