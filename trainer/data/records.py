"""Documents from blocks of raw input: what a process parses and checks in one go; errors name file and line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from trainer.errors import DataError

BLOCK_BYTES = 1 << 20
"""Input that is read, parsed and tokenized at a time. It decides where shards end, and nothing else."""
_TEXT_BLOCKS = 1024
_BATCH_ROWS = 64
"""Records of a columnar file that are read at a time, until a block has BLOCK_BYTES."""


class Block(NamedTuple):
    """Consecutive records of one file."""

    path: str
    first: int
    """Number of the first line (of JSON lines) or record, from 1."""
    content: bytes | list
    """JSON lines as they stand in the file, or records."""
    done: float
    """Share of the input that is read when this block is."""
    wanted_N: np.ndarray | None = None
    """Which of its documents are wanted; None: all."""


class Reader(Protocol):
    """How a record becomes a document. Sent to other processes, so it can be pickled."""

    paired: bool
    """Whether documents have a source."""

    def document(self, record: object, place: str) -> tuple[str, str] | None:
        """(source, target), or None for a record to leave out. DataError, naming `place`, where it is faulty."""

    def columns(self, names: Iterable[str], path: str) -> list[str]:
        """The fields that are read, of a file that has fields `names`; DataError where they are not there."""


@dataclass(frozen=True)
class Fields:
    """Reads documents from strings at the top of a record: `source` and `target` where it has either, else `text`."""

    source: str
    target: str
    text: str
    paired: bool = True
    named_by: ClassVar[str] = "data."
    """What stands before source_field, target_field and text_field where the user names them."""

    def of(self, names: Iterable[str]) -> Fields:
        """These fields, for a corpus whose first record has fields `names`."""
        return replace(self, paired=self.source in names or self.target in names)

    def document(self, record: object, place: str) -> tuple[str, str]:
        """See Reader."""
        if not isinstance(record, dict):
            raise DataError(f"{place}: must be a JSON object, not {_KINDS[type(record)]}")
        for field in self._wanted:
            value = record.get(field, self)  # None is a value that a record may have
            if value is self:
                raise DataError(f"{place}: {self._missing(record)}")
            if not isinstance(value, str):
                raise DataError(f'{place}: field "{field}" must be a string, not {_kind(value)}')
        return (record[self.source], record[self.target]) if self.paired else ("", record[self.text])

    def columns(self, names: Iterable[str], path: str) -> list[str]:
        """See Reader."""
        if not set(self._wanted) <= set(names):
            raise DataError(f"{path}: {self._missing(names)}")
        return list(self._wanted)

    @property
    def _wanted(self) -> tuple[str, ...]:
        return (self.source, self.target) if self.paired else (self.text,)

    def _missing(self, names: Iterable[str]) -> str:
        return (f'needs fields "{self.source}" and "{self.target}", or "{self.text}"; '
                f"it has {', '.join(sorted(names)) or 'none'}. Name its fields by {self.named_by}source_field and "
                f"{self.named_by}target_field, or {self.named_by}text_field")


_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number",
          float: "a number", type(None): "null"}


def _kind(value: object) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def documents(block: Block, reader: Reader) -> tuple[list[str], list[str]]:
    """(sources, targets) of the wanted documents of a block, in order; sources are empty where there are none. Raises
    DataError."""
    sources, targets = [], []
    for place, record in _records(block):
        document = reader.document(record, place)
        if document is not None:
            for text in document:
                _check_text(text, place)
            sources.append(document[0])
            targets.append(document[1])
    if block.wanted_N is None:
        return sources, targets
    return list(compress(sources, block.wanted_N)), list(compress(targets, block.wanted_N))


def texts(blocks: Iterable[Block], reader: Reader) -> Iterator[str]:
    """Sources and targets, document by document, of all blocks; of about _TEXT_BLOCKS, spread evenly, where there are
    more. Raises DataError."""
    taken = 0
    for block in blocks:
        if taken < _TEXT_BLOCKS * block.done:
            taken += 1
            for pair in zip(*documents(block, reader), strict=True):
                yield from filter(None, pair)


def _check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{place}: has half of a surrogate pair in its text") from None


def _records(block: Block) -> Iterator[tuple[str, object]]:
    """(place for messages, record)."""
    if isinstance(block.content, list):
        for number, record in enumerate(block.content, block.first):
            yield f"{block.path}: record {number}", record
        return
    for number, line in enumerate(block.content.split(b"\n"), block.first):
        place = f"{block.path}:{number}"
        try:
            text = line.decode().strip()
            if text:
                yield place, json.loads(text)
        except UnicodeDecodeError:
            raise DataError(f"{place}: is not UTF-8") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: is not valid JSON: {error.msg} (column {error.colno})") from None


def json_blocks(path: Path) -> Iterator[Block]:
    """A file of JSON lines, gzipped or not, block by block; one that is a JSON list, at once. Raises DataError where it
    is empty, damaged, or such a list is faulty; the rest shows when a block is parsed."""
    size, number, found = path.stat().st_size, 1, False
    try:
        with open(path, "rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as handle:
            while content := handle.read(BLOCK_BYTES):
                content += handle.readline()
                if number == 1:
                    content = content.removeprefix(b"\xef\xbb\xbf")
                    if content.lstrip().startswith(b"["):
                        yield Block(str(path), 1, _json_list(path, content + handle.read()), 1.0)
                        return
                yield Block(str(path), number, content, raw.tell() / size)
                number += content.count(b"\n")
                found = found or not content.isspace()
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: is damaged: {error}") from None
    if not found:
        raise DataError(f"{path}: is empty")


def _json_list(path: Path, content: bytes) -> list:
    try:
        records = json.loads(content.decode())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: is not valid JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8") from None
    if not records:
        raise DataError(f"{path}: is empty")
    return records


def parquet_blocks(path: Path, reader: Reader) -> Iterator[Block]:
    """A Parquet file, block by block, of which only the columns that are needed are read. Raises DataError."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = reader.columns(file.schema_arrow.names, str(path))
            if not file.metadata.num_rows:
                raise DataError(f"{path}: is empty")
            batches = file.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False)
            yield from column_blocks(str(path), file.metadata.num_rows, batches)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def column_blocks(name: str, rows: int, batches: Iterable) -> Iterator[Block]:
    """Blocks of about BLOCK_BYTES from Arrow's record batches, of `rows` rows in all."""
    records, size, first = [], 0, 1
    for batch in batches:
        try:
            records += batch.to_pylist()
        except UnicodeDecodeError:  # Arrow does not look at the bytes of a string before this
            raise DataError(f"{name}: is not UTF-8") from None
        size += batch.nbytes
        done = first + len(records) - 1 == rows
        if size >= BLOCK_BYTES or done:
            yield Block(name, first, records, (first + len(records) - 1) / rows)
            first, records, size = first + len(records), [], 0


def field_names(path: Path) -> list[str]:
    """Names of the fields of a file's first record. Raises DataError where there is none, or it is no object."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_schema(path).names
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    for block in json_blocks(path):
        for place, record in _records(block):
            if not isinstance(record, dict):
                raise DataError(f"{place}: must be a JSON object, not {_kind(record)}")
            return list(record)
    raise DataError(f"{path}: is empty")
