"""Tokenized corpora as shards on disk, found again by a digest of all that they depend on."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.data.corpus import Corpus
from trainer.data.files import build_once, write_text_whole, write_whole
from trainer.data.progress import progress
from trainer.data.records import BLOCK_BYTES, Block, Reader, documents
from trainer.data.vocabulary import Vocabulary
from trainer.data.workers import ALONE, Workers
from trainer.errors import DataError

_FORMAT = 2
_MANIFEST = "manifest.json"
_SHARD_TOKENS = 16_000_000
_OPEN_FILES = 128
_TEXTS = 32  # texts given to sentencepiece at a time: its results are several times as large as they
SOURCE, TARGET = 0, 1


class TokenCache:
    """Token ids of all documents of one or more tokenized corpora, whole and without special tokens, read from disk as
    needed.

    N documents of C corpora, in order: `bounds` [C + 1] are their first documents; `source_lengths_N` and
    `target_lengths_N` count tokens; `paired_N` is False for documents that are a text without a source, the target.
    `bos_id`, `eos_id`, `pad_id`, `vocab_size` and `vocabulary` (a digest) are the vocabulary's, which must be the same
    for all: DataError.
    """

    def __init__(self, *folders: str | Path):
        self.folders = tuple(map(Path, folders))
        manifests = [json.loads((folder / _MANIFEST).read_text()) for folder in self.folders]
        self.vocabulary: str = manifests[0]["vocabulary"]
        for folder, manifest in zip(self.folders, manifests, strict=True):
            if manifest["vocabulary"] != self.vocabulary:
                raise DataError(f"{folder}: was tokenized with another vocabulary than {self.folders[0]}")
        self.bos_id, self.eos_id, self.pad_id = (manifests[0][f"{name}_id"] for name in ("bos", "eos", "pad"))
        self.vocab_size: int = manifests[0]["vocab_size"]
        self.bounds = np.cumsum([0, *(manifest["documents"] for manifest in manifests)])
        self.paired_N = np.repeat([manifest["paired"] for manifest in manifests], np.diff(self.bounds))
        self._shards = [folder / f"{number:05}" for folder, manifest in zip(self.folders, manifests, strict=True)
                        for number in range(manifest["shards"])]
        lengths = [np.load(_lengths_file(shard)) for shard in self._shards]
        self._firsts = np.cumsum([0, *map(len, lengths)])
        lengths_NS = np.concatenate(lengths).astype(np.int64)
        self.source_lengths_N, self.target_lengths_N = np.ascontiguousarray(lengths_NS.T)
        # Where a document's source starts in its shard; its target follows.
        ends_N = np.concatenate([[0], np.cumsum(lengths_NS.sum(1))])
        self._starts_N = ends_N[:-1] - np.repeat(ends_N[self._firsts[:-1]], np.diff(self._firsts))
        self._kind = _token_type(self.vocab_size)
        # Mapped files would count as this process's memory once they are read, and each keeps a descriptor as well.
        self._open = functools.lru_cache(_OPEN_FILES)(self._opened)

    def __len__(self) -> int:
        return len(self.target_lengths_N)

    @property
    def paired(self) -> bool:
        """Whether every document has a source."""
        return bool(self.paired_N.all())

    @property
    def name(self) -> str:
        """The folders, for messages."""
        return ", ".join(map(str, self.folders))

    def source(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Source tokens start:stop of a document, read-only."""
        return self._read(document, 0, self.source_lengths_N[document], start, stop)

    def target(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Target tokens start:stop of a document, read-only."""
        return self._read(document, self.source_lengths_N[document], self.target_lengths_N[document], start, stop)

    def _opened(self, shard: int) -> FileIO:
        return open(_tokens_file(self._shards[shard]), "rb", buffering=0)

    def _read(self, document: int, offset: int, length: int, start: int, stop: int | None) -> np.ndarray:
        shard = int(np.searchsorted(self._firsts, document, "right")) - 1
        first = int(self._starts_N[document] + offset) + start
        count = int(length if stop is None else min(stop, length)) - start
        size = self._kind().itemsize
        file = self._open(shard)
        return np.frombuffer(os.pread(file.fileno(), max(count, 0) * size, first * size), self._kind)


class Encoded(NamedTuple):
    """A block of documents in tokens."""

    tokens_T: np.ndarray
    """Source and target of each document in turn."""
    lengths_NS: np.ndarray
    """Tokens of each document's source and target."""
    done: float


def open_token_cache(corpus: Corpus, vocabulary: Vocabulary, cache_dir: str | Path, *,
                     workers: Workers = ALONE, progress: bool = False) -> TokenCache:
    """The corpus in tokens: from `cache_dir` where it is there and whole, otherwise made there first.

    Its place depends on the corpus' content, the vocabulary and the format, so a cache is never stale, and
    lengths may change without another tokenization. Safe to interrupt: the shards that are done stay. Safe when many
    ranks ask at once (one works, the others wait). `progress` shows a bar with the time left. Raises DataError where
    the corpus is faulty or empty.
    """
    key = hashlib.sha256(f"{_FORMAT} {BLOCK_BYTES} {corpus.digest} {vocabulary.digest}".encode()).hexdigest()
    folder = Path(cache_dir).absolute() / "tokens" / key[:24]

    def build(temporary: Path) -> None:
        write_token_cache(temporary, corpus.blocks(), corpus.reader, vocabulary, workers,
                          corpus.name if progress else "")

    build_once(folder, is_token_cache, build, resumable=True)
    return TokenCache(folder)


def write_token_cache(folder: Path, blocks: Iterable[Block], reader: Reader, vocabulary: Vocabulary, workers: Workers,
                      title: str = "") -> None:
    """Tokenizes documents into `folder`, going on after the shards that are whole there already.

    A shard ends with the block that makes it exceed a fixed number of tokens: shards depend on the documents and the
    vocabulary only. title: of the progress bar; empty for none. Raises DataError if there are no documents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _whole_shards(folder)
    encode = functools.partial(encode_block, reader=reader, vocabulary=vocabulary)
    left = islice(blocks, sum(shard["blocks"] for shard in shards), None)
    count, tokens, parts = sum(shard["documents"] for shard in shards), 0, []
    with progress(title and f"tokenizing {title}") as show:
        for part in workers.map(encode, left):
            parts.append(part)
            tokens, count = tokens + len(part.tokens_T), count + len(part.lengths_NS)
            show(part.done, count)
            if tokens >= _SHARD_TOKENS:
                shards.append(_write_shard(folder, len(shards), parts))
                tokens, parts = 0, []
    if parts:
        shards.append(_write_shard(folder, len(shards), parts))
    if not count:
        raise DataError(f"{title or folder}: holds no documents")
    for leftover in [*folder.glob("*.tmp-*"), *folder.glob("*.json")]:
        leftover.unlink()
    manifest = {"format": _FORMAT, "documents": count, "paired": reader.paired, "shards": len(shards),
                "tokens": sum(shard["tokens"] for shard in shards),
                "vocabulary": vocabulary.digest, "vocab_size": vocabulary.size,
                "bos_id": vocabulary.bos_id, "eos_id": vocabulary.eos_id, "pad_id": vocabulary.pad_id,
                "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())}}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2))


def is_token_cache(folder: Path) -> bool:
    """Whether a tokenized corpus is there, and whole."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return manifest["format"] == _FORMAT and all((folder / name).stat().st_size == size
                                                     for name, size in manifest["bytes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def encode_block(block: Block, reader: Reader, vocabulary: Vocabulary) -> Encoded:
    """The wanted documents of a block in tokens. Raises DataError for faulty ones."""
    texts = [text for pair in zip(*documents(block, reader), strict=True) for text in pair]
    kind = _token_type(vocabulary.size)
    parts, lengths = [np.empty(0, kind)], []
    for start in range(0, len(texts), _TEXTS):
        encoded = vocabulary.encode_arrays(texts[start:start + _TEXTS])
        parts += [ids.astype(kind) for ids in encoded]
        lengths += map(len, encoded)
    return Encoded(np.concatenate(parts), np.array(lengths, np.int32).reshape(-1, 2), block.done)


def _write_shard(folder: Path, number: int, parts: Sequence[Encoded]) -> dict:
    """Writes a shard; the file with its facts comes last, and says that the others are whole."""
    shard = folder / f"{number:05}"
    tokens_T = np.concatenate([part.tokens_T for part in parts])
    lengths_NS = np.concatenate([part.lengths_NS for part in parts])
    facts = {"blocks": len(parts), "documents": len(lengths_NS), "tokens": len(tokens_T)}
    write_whole(_tokens_file(shard), lambda handle: handle.write(tokens_T.data))
    write_whole(_lengths_file(shard), lambda handle: np.save(handle, lengths_NS))
    write_text_whole(shard.with_suffix(".json"), json.dumps(facts))
    return facts


def _whole_shards(folder: Path) -> list[dict]:
    shards = []
    while (facts := folder / f"{len(shards):05}.json").exists():
        shards.append(json.loads(facts.read_text()))
    return shards


def _token_type(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _tokens_file(shard: Path) -> Path:
    return shard.with_suffix(".tokens")


def _lengths_file(shard: Path) -> Path:
    return shard.with_suffix(".lengths.npy")
