"""Tokenized corpora as memory-mapped arrays, found again by a digest of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from trainer.data.corpus import Corpus
from trainer.data.files import build_once
from trainer.data.vocabulary import Vocabulary
from trainer.errors import DataError

_FORMAT = 1
_MANIFEST = "manifest.json"
_BATCH = 256  # documents tokenized at a time
_SIDES = ("source", "target")


class TokenCache:
    """Token ids of all documents of a corpus, whole and without special tokens, read from disk as needed.

    N documents: `source_lengths_N` and `target_lengths_N` are int64 arrays of tokens. `paired` is False for
    corpora without sources, whose texts are the targets. `bos_id`, `eos_id`, `pad_id`, `vocab_size` are the
    vocabulary's.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = json.loads((self.folder / _MANIFEST).read_text())
        self.paired: bool = manifest["paired"]
        self.bos_id, self.eos_id, self.pad_id = manifest["bos_id"], manifest["eos_id"], manifest["pad_id"]
        self.vocab_size: int = manifest["vocab_size"]
        kind = _token_type(self.vocab_size)
        self._tokens = {side: _mapped(self._file(side, "tokens"), kind) for side in _SIDES}
        self._starts = {side: np.fromfile(self._file(side, "starts"), np.int64) for side in _SIDES}
        self.source_lengths_N, self.target_lengths_N = (np.diff(self._starts[side]) for side in _SIDES)

    def __len__(self) -> int:
        return len(self.target_lengths_N)

    def source(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Source tokens start:stop of a document, as a view of the file."""
        return self._read("source", document, start, stop)

    def target(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Target tokens start:stop of a document, as a view of the file."""
        return self._read("target", document, start, stop)

    def _read(self, side: str, document: int, start: int, stop: int | None) -> np.ndarray:
        first, last = self._starts[side][document], self._starts[side][document + 1]
        return self._tokens[side][first + start:last if stop is None else min(first + stop, last)]

    def _file(self, side: str, what: str) -> Path:
        return self.folder / f"{side}.{what}"


def open_token_cache(corpus: Corpus, vocabulary: Vocabulary, cache_dir: str | Path, *,
                     threads: int | None = None, progress: bool = False) -> TokenCache:
    """The corpus in tokens: from `cache_dir` where it is there and whole, otherwise made there first.

    Its place depends on the corpus' content, the vocabulary and the format, so a cache is never stale, and
    lengths may change without another tokenization. Safe to interrupt, and safe when many ranks ask at once
    (one works, the others wait). `threads` is 1 to all cores (default), `progress` shows a bar with the time
    left. Raises DataError where the corpus is faulty or empty.
    """
    key = hashlib.sha256(f"{_FORMAT} {corpus.digest} {vocabulary.digest}".encode()).hexdigest()
    folder = Path(cache_dir).absolute() / "tokens" / key[:24]

    def build(temporary: Path) -> None:
        _write(corpus, vocabulary, temporary, threads or len(os.sched_getaffinity(0)), progress)

    build_once(folder, _is_whole, build)
    return TokenCache(folder)


def _write(corpus: Corpus, vocabulary: Vocabulary, folder: Path, threads: int, progress: bool) -> None:
    count = len(corpus)
    if not count:
        raise DataError(f"{corpus.name}: holds no documents")
    folder.mkdir()
    kind = _token_type(vocabulary.size)
    starts = {side: np.zeros(count + 1, np.int64) for side in _SIDES}
    done = 0
    with (open(folder / "source.tokens", "wb") as source, open(folder / "target.tokens", "wb") as target,
          tqdm(total=count, desc=f"tokenizing {corpus.name}", unit=" docs", disable=not progress) as bar):
        for texts in corpus.batches(_BATCH):
            size = len(texts[0])
            for side, handle, part in zip(_SIDES, (source, target), texts, strict=True):
                encoded = vocabulary.encode(part, threads)
                starts[side][done + 1:done + size + 1] = [len(ids) for ids in encoded]
                for ids in encoded:
                    handle.write(np.array(ids, kind).tobytes())
            done += size
            bar.update(size)
    for side in _SIDES:
        np.cumsum(starts[side]).tofile(folder / f"{side}.starts")
    manifest = {"format": _FORMAT, "corpus": corpus.name, "documents": count, "paired": corpus.paired,
                "vocabulary": vocabulary.digest, "vocab_size": vocabulary.size,
                "bos_id": vocabulary.bos_id, "eos_id": vocabulary.eos_id, "pad_id": vocabulary.pad_id,
                "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())}}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2))


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _MANIFEST).read_text())["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _token_type(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _mapped(path: Path, kind: type) -> np.ndarray:
    if not path.stat().st_size:
        return np.empty(0, kind)  # an empty file cannot be mapped
    return np.memmap(path, kind, "r")
