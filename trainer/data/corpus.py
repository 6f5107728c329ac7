"""Where the documents of a split are: JSON lines, Parquet or the Hugging Face hub, read as a stream of blocks."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.config import CorpusConfig
from trainer.data.records import (
    Block,
    Fields,
    Reader,
    column_blocks,
    field_names,
    json_blocks,
    parquet_blocks,
)
from trainer.errors import DataError, storage_failure

if TYPE_CHECKING:
    from datasets import Dataset

REPOSITORY = Path(__file__).resolve().parents[2]
_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.+-]+){0,2}")
_HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


@dataclass(frozen=True)
class Corpus:
    """Documents in files or in a data set of the hub, of which no more than a block is in memory at a time.

    Local files never touch the network. Every access raises DataError, in one line, where the documents are not what
    was promised.
    """

    name: str
    files: tuple[Path, ...]
    """Local files, in the order of their documents; empty for a hub data set."""
    hub: tuple[str, str | None, str] | None
    """Hub data set: name, configuration, split."""
    form: Fields | Reader
    """How records are read: Fields are those of the first record, for all."""
    cache_dir: Path
    """Where data sets of the hub are kept."""

    @cached_property
    def reader(self) -> Reader:
        """How records become documents. Whether a corpus has sources is what its first record has."""
        if not isinstance(self.form, Fields):
            return self.form
        return self.form.of(self._dataset.column_names if self.hub else field_names(self.files[0]))

    @cached_property
    def digest(self) -> str:
        """Hash of everything that the documents depend on: bytes of the files, and how they are read."""
        total = hashlib.sha256(repr(self.form).encode())
        for path in self.files or [Path(f["filename"]) for f in self._dataset.cache_files]:
            try:
                with open(path, "rb") as handle:
                    total.update(hashlib.file_digest(handle, "sha256").digest())
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        return total.hexdigest()

    def blocks(self) -> Iterator[Block]:
        """The records in order; `done` counts over the whole corpus."""
        if self.hub:
            dataset = self._dataset.select_columns(self.reader.columns(self._dataset.column_names, self.name))
            batches = (batch for table in dataset.with_format("arrow").iter(64) for batch in table.to_batches())
            yield from column_blocks(self.name, len(dataset), batches)
            return
        sizes = [path.stat().st_size for path in self.files]
        before = 0
        for path, size in zip(self.files, sizes, strict=True):
            for block in parquet_blocks(path, self.reader) if path.suffix == ".parquet" else json_blocks(path):
                yield block._replace(done=(before + block.done * size) / sum(sizes))
            before += size

    @cached_property
    def _dataset(self) -> Dataset:
        import datasets  # slow to import, and not needed for local files

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        name, configuration, split = self.hub
        try:
            loaded = datasets.load_dataset(name, configuration, split=split, cache_dir=str(self.cache_dir),
                                           keep_in_memory=False)  # its files are what `digest` reads
        except Exception as error:  # of many kinds: Arrow's, the hub's, the file system's
            cause = error.__cause__ or error
            if isinstance(cause, OSError) and storage_failure(cause):
                raise cause from None  # the cache's disk, not the documents
            reason = (str(cause).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"{self.name}: cannot be loaded: {reason} (nor is there a local file or folder of this "
                            "name)") from error
        if not len(loaded):
            raise DataError(f"{self.name}: holds no documents")
        return loaded


def find_corpus(corpus: CorpusConfig, split: str, cache_dir: str | Path, key: str = "",
                reader: Reader | None = None) -> Corpus:
    """The corpus at a path, folder, glob, list of these, or hub name.

    split: train, valid or test, which says what part of a hub data set is meant. key: of the configuration, for
    messages (default: data.SPLIT). reader: in place of the corpus' fields. Raises DataError where nothing is there or
    a file is empty.
    """
    where, key = corpus.documents, key or f"data.{split}"
    hub, files = None, []
    for part in [where] if isinstance(where, str) else where:
        found = _local_files(part, key)
        if found is None and where != part:
            raise DataError(f"{key}: {part} does not exist; a list holds files, folders and globs only")
        if found is None:
            hub = _hub_name(part, split)
        else:
            files += found
    for path in files:
        if not path.name.endswith(_SUFFIXES):
            raise DataError(f"{path}: is not of a form that is read ({', '.join(_SUFFIXES)}): write JSON lines, one "
                            "object a line")
        if not path.stat().st_size:
            raise DataError(f"{path}: is empty")
    form = reader or Fields(corpus.source_field, corpus.target_field, corpus.text_field)
    return Corpus(str(where), tuple(files), hub, form, Path(cache_dir).absolute() / "datasets")


def _local_files(part: str, key: str) -> list[Path] | None:
    """Files of one path, folder or glob; None for what can only be a hub name."""
    given = Path(part).expanduser()
    for path in (given, REPOSITORY / given):
        if path.is_file():
            return [path]
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.name.endswith(_SUFFIXES))
        elif glob.has_magic(part):
            files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        else:
            continue
        if files:
            return files
    if glob.has_magic(part) or given.is_dir() or (REPOSITORY / given).is_dir():
        raise DataError(f"{key}: {part} has no files ({', '.join(_SUFFIXES)})")
    if part.endswith(_SUFFIXES) or part.startswith((".", "/", "~")) or not _HUB_NAME.fullmatch(part):
        raise DataError(f"{key}: {part}: no such file or folder")
    return None


def _hub_name(part: str, split: str) -> tuple[str, str | None, str]:
    name, *rest = part.split(":")
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else _HUB_SPLITS[split]
