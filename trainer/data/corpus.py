"""Documents from JSON lines, Parquet or the Hugging Face hub; errors name file and line."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.config import DataConfig
from trainer.errors import DataError, storage_failure

if TYPE_CHECKING:
    from datasets import Dataset

REPOSITORY = Path(__file__).resolve().parents[2]
_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.+-]+){0,2}")
_HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


@dataclass(frozen=True)
class Corpus:
    """The documents of one split, loaded by Hugging Face `datasets` when they are first needed.

    Local files never touch the network. `paired` says whether documents have a source and a target or only a
    text. Every access raises DataError, in one line, where the documents are not what was promised.
    """

    name: str
    files: tuple[Path, ...]
    """Local files, in the order of their documents; empty for a hub data set."""
    hub: tuple[str, str | None, str] | None
    """Hub data set: name, configuration, split."""
    source_field: str
    target_field: str
    text_field: str
    cache_dir: Path

    @cached_property
    def digest(self) -> str:
        """Hash of everything that the documents depend on: bytes of the files, names of the fields."""
        total = hashlib.sha256(repr((self.source_field, self.target_field, self.text_field)).encode())
        for path in self.files or [Path(f["filename"]) for f in self._dataset.cache_files]:
            try:
                with open(path, "rb") as handle:
                    total.update(hashlib.file_digest(handle, "sha256").digest())
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        return total.hexdigest()

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def paired(self) -> bool:
        return self._dataset.column_names != [self.text_field]

    def batches(self, size: int = 256) -> Iterator[tuple[list[str], list[str]]]:
        """(sources, targets) of `size` documents at a time, in order. Sources are empty where there are
        none."""
        try:
            for batch in self._dataset.iter(size):
                targets = batch[self.target_field if self.paired else self.text_field]
                yield batch[self.source_field] if self.paired else [""] * len(targets), targets
        except UnicodeDecodeError:  # Arrow does not look at the bytes of a string before this
            raise DataError(f"{self.name}: is not UTF-8") from None

    def texts(self) -> Iterator[str]:
        """All sources and targets, document by document."""
        for sources, targets in self.batches():
            for pair in zip(sources, targets, strict=True):
                yield from filter(None, pair)

    @cached_property
    def _dataset(self) -> Dataset:
        import datasets  # slow to import, and not needed where the tokenized corpus is there already

        for path in self.files:
            if path.suffix != ".parquet":
                # Arrow would name no line, and would turn numbers into strings in some places but not in others.
                _check_json(path, self)
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        try:
            loaded = self._load(datasets)
        except Exception as error:  # of many kinds: Arrow's, the hub's, the file system's
            cause = error.__cause__ or error
            if isinstance(cause, OSError) and storage_failure(cause):
                raise cause from None  # the cache's disk, not the documents
            reason = (str(cause).strip() or type(error).__name__).splitlines()[0]
            hint = " (nor is there a local file or folder of this name)" if self.hub else ""
            raise DataError(f"{self.name}: cannot be loaded: {reason}{hint}") from error
        return self._checked(loaded)

    def _load(self, datasets) -> Dataset:
        if self.hub:
            name, configuration, split = self.hub
            return datasets.load_dataset(name, configuration, split=split, cache_dir=str(self.cache_dir),
                                         keep_in_memory=False)  # its files are what `digest` reads
        paths = [str(path) for path in self.files]
        # A folder of its own for every content: the data set's own cache goes by name and time of the files.
        cache = str(self.cache_dir / self.digest[:16])
        if paths[0].endswith(".parquet"):
            return datasets.Dataset.from_parquet(paths, cache_dir=cache)
        return datasets.Dataset.from_json(paths, cache_dir=cache, parse_agent_traces=False)

    def _checked(self, loaded: Dataset) -> Dataset:
        if not len(loaded):
            raise DataError(f"{self.name}: holds no documents")
        fields = _fields(loaded.column_names, self)
        if not set(fields) <= set(loaded.column_names):
            raise DataError(f"{self.name}: {_no_fields(self, loaded.column_names)}")
        for field in fields:
            kind, nulls = loaded.features[field], loaded.data.column(field).null_count
            if getattr(kind, "dtype", None) not in ("string", "large_string") or nulls:
                found = "missing or null in some records" if nulls else f"of type {kind}"
                raise DataError(f'{self.name}: field "{field}" must be a string; it is {found}')
        return loaded.select_columns(list(fields))


def find_corpus(where: str | list[str], split: str, config: DataConfig) -> Corpus:
    """The corpus at a path, folder, glob, list of these, or hub name. `split` is train, valid or test.

    Raises DataError where nothing is there, a file is empty, or kinds of files are mixed.
    """
    key = f"data.{split}"
    hub, files = None, []
    for part in [where] if isinstance(where, str) else where:
        found = _local_files(part, key)
        if found is None and where != part:
            raise DataError(f"{key}: {part} does not exist; a list holds files, folders and globs only")
        if found is None:
            hub = _hub_name(part, split, key)
        else:
            files += found
    for path in files:
        if not path.stat().st_size:
            raise DataError(f"{path}: is empty")
    if len({path.suffix == ".parquet" for path in files}) > 1:
        raise DataError(f"{key}: {where} has both JSON and Parquet files; use one kind")
    return Corpus(str(where), tuple(files), hub, config.source_field, config.target_field, config.text_field,
                  Path(config.cache_dir).absolute() / "datasets")


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


def _hub_name(part: str, split: str, key: str) -> tuple[str, str | None, str]:
    name, *rest = part.split(":")
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else _HUB_SPLITS[split]


def _fields(names: Iterable[str], corpus: Corpus) -> tuple[str, ...]:
    """The fields that a corpus is read from whose records, or whose first record, have fields `names`."""
    paired = corpus.source_field in names or corpus.target_field in names
    return (corpus.source_field, corpus.target_field) if paired else (corpus.text_field,)


def _no_fields(corpus: Corpus, names: Iterable[str]) -> str:
    return (f'needs fields "{corpus.source_field}" and "{corpus.target_field}", or "{corpus.text_field}"; '
            f"it has {', '.join(sorted(names)) or 'none'}")


def _check_json(path: Path, corpus: Corpus) -> None:
    """DataError for the first record that lacks a field or has no string in it."""
    fields = None
    for place, record in _json_records(path):
        if not isinstance(record, dict):
            raise DataError(f"{place}: must be a JSON object, not {_KINDS[type(record)]}")
        fields = fields or _fields(record, corpus)
        for field in fields:
            if field not in record:
                raise DataError(f"{place}: {_no_fields(corpus, record)}")
            if not isinstance(record[field], str):
                raise DataError(f'{place}: field "{field}" must be a string, not {_KINDS[type(record[field])]}')
            try:
                record[field].encode()
            except UnicodeEncodeError:
                raise DataError(f'{place}: field "{field}" has half of a surrogate pair') from None
    if not fields:
        raise DataError(f"{path}: is empty")


_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number",
          float: "a number", type(None): "null"}


def _json_records(path: Path) -> Iterator[tuple[str, object]]:
    """(place for messages, record) of JSON lines, or of one JSON list."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if number == 1 and text.startswith("["):
                    whole = text + "\n" + lines.read().decode()
                    yield from ((f"{path}: record {i}", record) for i, record in enumerate(json.loads(whole), 1))
                elif text:
                    yield f"{path}:{number}", json.loads(text)
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise DataError(f"{path}:{line}: is not valid JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}:{number}: is not UTF-8") from None
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: is damaged: {error}") from None
