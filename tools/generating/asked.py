"""What to generate for: documents with sources, texts with gaps, or nothing at all. Each is numbered; the number keys
its noise."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from model.packing import source_segment
from tools.generating.identity import digest
from trainer.config import RunConfig
from trainer.data.corpus import find_corpus
from trainer.data.evaluation import evaluation_samples
from trainer.data.prepare import prepare
from trainer.data.records import Fields, documents
from trainer.data.vocabulary import Vocabulary
from trainer.errors import DataError
from trainer.generate import GappedText, no_source

_GAP = re.compile(r"<gap:(\d+)>")


class Source(NamedTuple):
    """A document's number, and its source: ids with <bos> and </s>; empty for models of texts without source."""

    number: int
    ids: np.ndarray


class Asked(Protocol):
    """numbers: of all that is wanted, in order. digest: of the documents; "" where the command line says all."""

    numbers: Sequence[int]
    digest: str

    def task(self, number: int) -> Source | GappedText:
        """What the model is given."""

    def known(self, number: int) -> dict[str, str]:
        """What the record says besides what was generated."""


class Documents:
    """The documents of a split. limit: so many, spread evenly (0: all). config: with the vocabulary's file.
    targets_needed: whether every document has one. DataError where the documents are not there or faulty."""

    def __init__(self, config: RunConfig, split: str, limit: int, targets_needed: bool):
        data = config.data
        fields = None if targets_needed else _OptionalTarget(data.source_field, data.target_field, data.text_field)
        self._data = prepare(data, splits=(split,), progress=True, reader=fields)
        self._samples, self._cache = self._data.samples(split, draws=1), self._data.caches[split]
        self._targets_needed = targets_needed
        self.numbers = evaluation_samples(len(self._samples), limit).tolist()
        self.digest = digest(path for folder in self._cache.folders for path in sorted(folder.iterdir()))

    def task(self, number: int) -> Source:
        """See Asked."""
        return Source(number, self._samples.source(number))

    def known(self, number: int) -> dict[str, str]:
        """Source, and reference if there is one: of a text without source, the chunk that its number stands for."""
        document = self._samples.document_S[number]
        # A pair is one sample, and judged by its whole target; of a text without source every chunk is a sample.
        paired = self._cache.paired_N[document]
        target = self._cache.target(document) if paired else self._samples.canvas(number)
        source, reference = self._data.vocabulary.decode([self._cache.source(document), target])
        return {"source": source, **({"reference": reference} if reference or self._targets_needed else {})}


@dataclass(frozen=True)
class _AskedFields(Fields):
    """Fields of documents that the command line names."""

    named_by: ClassVar[str] = "--"


@dataclass(frozen=True)
class _OptionalTarget(_AskedFields):
    """Documents as in training, but of those with a source the target may be missing."""

    def document(self, record: object, place: str) -> tuple[str, str]:
        if isinstance(record, dict) and self.source in record:
            record = {self.target: "", **record}
        return super().document(record, place)

    def columns(self, names: Iterable[str], path: str) -> list[str]:
        wanted = super().columns([*names, self.target] if self.source in names else names, path)
        return [name for name in wanted if name in names]


class Prompt:
    """One source, from the command line."""

    numbers, digest = (0,), ""

    def __init__(self, config: RunConfig, vocabulary: Vocabulary, text: str):
        self._text, self._ids = text, _source(config, vocabulary, text)

    def task(self, number: int) -> Source:
        """See Asked."""
        return Source(number, self._ids)

    def known(self, number: int) -> dict[str, str]:
        """The source."""
        return {"source": self._text}


class Nothing:
    """`count` times no source. texts_only: the model is one of texts that never had sources."""

    digest = ""

    def __init__(self, config: RunConfig, vocabulary: Vocabulary, count: int, texts_only: bool):
        self.numbers = range(count)
        self._ids = np.empty(0, np.int64) if texts_only else no_source(config.model, vocabulary)

    def task(self, number: int) -> Source:
        """See Asked."""
        return Source(number, self._ids)

    def known(self, number: int) -> dict[str, str]:
        """Nothing."""
        return {}


class Gapped:
    """Targets (of texts without source: texts) in which <gap:N> stands for N tokens to fill. limit: as in Documents.
    DataError for one without a gap, or longer than the model's canvas."""

    def __init__(self, config: RunConfig, vocabulary: Vocabulary, where: str, limit: int):
        data = dataclasses.replace(config.data, test=where)
        fields = _AskedFields(data.source_field, data.target_field, data.text_field)
        corpus = find_corpus(data.corpora("test")["test"], "test", data.cache_dir, "--fill", fields)
        self._texts = [pair for block in corpus.blocks() for pair in zip(*documents(block, corpus.reader), strict=True)]
        self.numbers, self.digest = evaluation_samples(len(self._texts), limit).tolist(), corpus.digest
        self._tasks = {}
        for number in self.numbers:
            source, target = self._texts[number]
            ids = _source(config, vocabulary, source) if corpus.reader.paired else np.empty(0, np.int64)
            pieces = _pieces(vocabulary, target, data.max_target_tokens, f"{where}: document {number}")
            self._tasks[number] = GappedText(number, ids, pieces)

    def task(self, number: int) -> GappedText:
        """See Asked."""
        return self._tasks[number]

    def known(self, number: int) -> dict[str, str]:
        """Source, and the target with its gaps."""
        source, target = self._texts[number]
        return {"source": source, "gapped": target}


def _pieces(vocabulary: Vocabulary, target: str, canvas: int, place: str) -> tuple[np.ndarray | int, ...]:
    """As GappedText wants them."""
    parts = _GAP.split(target)  # texts and, between two of them, the length of the gap
    texts, gaps = vocabulary.encode(parts[::2]), list(map(int, parts[1::2]))
    pieces = [piece for text, gap in zip_longest(texts, gaps, fillvalue=0) for piece in (np.array(text, np.int64), gap)]
    pieces = [piece for piece in pieces if np.size(piece) and not (isinstance(piece, int) and piece == 0)]
    if not any(isinstance(piece, int) for piece in pieces):
        raise DataError(f"{place} has no gap to fill: mark one as <gap:12>, where 12 is the number of its tokens")
    tokens = sum(piece if isinstance(piece, int) else len(piece) for piece in pieces)
    if tokens + (not isinstance(pieces[-1], int)) > canvas:
        raise DataError(f"{place} has a target of {tokens} tokens, gaps included, but the model was trained with "
                        f"{canvas}, the end included: divide it")
    return tuple(pieces)


def _source(config: RunConfig, vocabulary: Vocabulary, text: str) -> np.ndarray:
    return source_segment(vocabulary.encode([text])[0], config.data.longest_source(), vocabulary.bos_id,
                          vocabulary.eos_id)
