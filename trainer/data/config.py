"""Where the documents are, and how they become packed rows of tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from model.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """One of several corpora that make up a split: `[data.train.NAME]` in a configuration file."""

    documents: str | list[str] = ""
    """Where they are, in the forms that `data.train` takes."""
    weight: float = 1.0
    """How often an epoch holds each document: 2 is twice, 0.25 every fourth, another one each time. Only for
    training."""
    source_field: str = ""
    """Empty: as `data.source_field` says."""
    target_field: str = ""
    """Empty: as `data.target_field` says."""
    text_field: str = ""
    """Empty: as `data.text_field` says."""


_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpora, vocabulary, lengths and packing. Formats and policies: `docs/data.md`."""

    train: str | list[str] | dict[str, CorpusConfig] = "data/proposals/train.jsonl.gz"
    """Documents to train on: a file (.jsonl, .json, .parquet; JSON may be gzipped), a folder, a glob, a list
    of these, a folder made by tools/prepare_data.py, or a Hugging Face hub name (`owner/name`, `name:split` or
    `name:configuration:split`). A relative path is looked up from the current folder, then from the repository.
    Or several named corpora: a table `[data.train.NAME]` for each, with `documents`, and where they differ `weight`
    (how often an epoch holds each document), `source_field`, `target_field`, `text_field`."""
    valid: str | list[str] | dict[str, CorpusConfig] = "data/proposals/valid.jsonl.gz"
    """Documents for evaluation while training, in the same forms, without weights. Empty for none."""
    test: str | list[str] | dict[str, CorpusConfig] = "data/proposals/test.jsonl.gz"
    """Documents for the final evaluation, in the same forms, without weights. Empty for none."""
    source_field: str = "src"
    """Field with the text that is given."""
    target_field: str = "trg"
    """Field with the text that is generated."""
    text_field: str = "text"
    """Field of corpora without a source: all of it is generated, in chunks of `max_target_tokens`. Used where
    a corpus has neither `source_field` nor `target_field`."""
    vocabulary: str = "train"
    """A sentencepiece model file with bos, eos and pad ids; or `train`: one is trained on the training
    documents, unless they are tokenized already (tools/prepare_data.py), with the vocabulary beside them."""
    vocab_size: int = 4096
    """Size of the vocabulary to train. Only with vocabulary = train."""
    max_source_tokens: int = 4096
    """A longer source is cut to this many tokens, its <bos> and </s> included. 0: only `row_tokens` limits
    it."""
    max_target_tokens: int = 256
    """Length of the canvas that every target is given, its </s> included. A shorter text is followed by
    <pad>, so that the canvas does not betray the text's length; a longer one is cut."""
    row_tokens: int = 8192
    """Most tokens in a packed row, the unit of the DeepSpeed JSON's micro-batch: a document takes its source
    and `draws_per_source` canvases. Sources that do not fit are cut."""
    draws_per_source: int = 1
    """Noised copies of the target for every time that a source is read."""
    lookahead: int = 256
    """Documents among which the packer searches for the next that fits a row."""
    prefetch: int = 2
    """Steps whose batches are made ahead of the training loop, in a background thread."""
    workers: int = 0
    """Processes that tokenize. 0: one for each core that this process may use."""
    cache_dir: str = ".cache/data"
    """Folder for trained vocabularies, tokenized corpora and the data sets behind them; best on a disk that
    all nodes share, otherwise each node fills its own."""

    def longest_document(self) -> int:
        """Tokens of the longest source that is kept, with one canvas."""
        room = self.row_tokens - (self.draws_per_source - 1) * self.max_target_tokens
        return min(room, self.max_source_tokens + self.max_target_tokens) if self.max_source_tokens else room

    def longest_source(self) -> int:
        """Tokens of the longest source that is kept, its <bos> and </s> included."""
        return self.longest_document() - self.max_target_tokens

    @classmethod
    def from_plain(cls, values: dict) -> DataConfig:
        """The configuration that `dataclasses.asdict` made `values` of."""
        tables = {key: {name: CorpusConfig(**corpus) for name, corpus in value.items()}
                  for key, value in values.items() if isinstance(value, dict)}
        return cls(**values | tables)

    def validate(self) -> None:
        """Refuses impossible values with ConfigError."""
        def need(ok: bool, key: str, problem: str) -> None:
            if not ok:
                raise ConfigError(f"data.{key}", problem)

        for key in ("max_target_tokens", "row_tokens", "draws_per_source", "lookahead", "prefetch"):
            need(getattr(self, key) > 0, key, f"must be positive, not {getattr(self, key)}")
        need(self.workers >= 0, "workers", f"must be 0 (one for each core) or positive, not {self.workers}")
        need(bool(self.train), "train", "is empty: give a file, folder, glob or hub name")
        for split in ("train", "valid", "test"):
            for name, corpus in self.corpora(split).items():
                key = f"{split}.{name}" if isinstance(getattr(self, split), dict) else split
                need(bool(_NAME.fullmatch(name)), key, "must be a name of letters, digits, _ and -")
                need(bool(corpus.documents), f"{key}.documents", "is empty: give a file, folder, glob or hub name")
                need(corpus.weight > 0, f"{key}.weight", f"must be positive, not {corpus.weight}")
                need(split == "train" or corpus.weight == 1, f"{key}.weight",
                     "only applies to data.train: evaluation takes every document once. Remove it")
        need(bool(self.vocabulary), "vocabulary", "is empty: give a sentencepiece model file, or `train`")
        need(bool(self.cache_dir), "cache_dir", "is empty: give a folder that every rank can write to")
        need(self.vocab_size >= 320, "vocab_size",
             f"is {self.vocab_size}; bytes and special tokens alone take 266: give at least 320")
        need(self.max_source_tokens == 0 or self.max_source_tokens >= 3, "max_source_tokens",
             f"must be 0 (no limit) or at least 3 (<bos>, a token, </s>), not {self.max_source_tokens}")
        canvases = self.draws_per_source * self.max_target_tokens
        need(canvases <= self.row_tokens, "row_tokens",
             f"{self.row_tokens} tokens cannot hold data.draws_per_source x data.max_target_tokens = "
             f"{self.draws_per_source} x {self.max_target_tokens}: raise it or lower the others")

    def corpora(self, split: str) -> dict[str, CorpusConfig]:
        """The corpora of a split by name, their fields filled in; one without a name of its own has the split's."""
        documents = getattr(self, split)
        if not isinstance(documents, dict):
            documents = {split: CorpusConfig(documents=documents)} if documents else {}
        return {name: replace(corpus, **{field: getattr(corpus, field) or getattr(self, field)
                                         for field in ("source_field", "target_field", "text_field")})
                for name, corpus in documents.items()}
