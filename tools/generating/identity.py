"""What a file of texts was made with, kept beside it, so that two ways of generating never share a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from model.errors import ConfigError
from tools.command import writing
from trainer.data.files import write_text_whole
from trainer.errors import DataError


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 of what is in the files, in their order. OSError where one cannot be read."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


def check(output: Path, facts: dict) -> None:
    """ConfigError where `output` cannot be, or holds texts of which it is not known that they were made with these
    facts: some or all of those that `resume` will be given, ready for JSON."""
    with writing("--output", output):
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists() and output.read_bytes():
            _compare(output, facts)


def resume(output: Path, facts: dict, *, replace: bool = False) -> set[int]:
    """Documents that `output` holds already; its half-written last line is dropped. facts: all that its texts depend
    on, which are kept beside it. ConfigError as from `check`, but with `replace` such texts are removed; DataError for
    a line that is no record."""
    try:
        check(output, facts)
    except ConfigError:
        if not replace:
            raise
        with writing("--output", output):
            output.unlink(missing_ok=True)
    with writing("--output", output):
        write_text_whole(_made_with(output), json.dumps(facts, indent=1) + "\n")
        lines = output.read_bytes().splitlines(keepends=True) if output.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            output.write_bytes(b"".join(lines := lines[:-1]))
    return {_document(line, f"{output}:{number}") for number, line in enumerate(lines, 1)}


def _made_with(output: Path) -> Path:
    return output.with_suffix(".settings.json")


def _compare(output: Path, facts: dict) -> None:
    made_with, otherwise = _made_with(output), "remove it, choose another file, or give --replace"
    try:
        before = dict(json.loads(made_with.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError("--output", f"{output} has no {made_with.name} beside it that says what it was made with: "
                          f"{otherwise}") from None
    except (ValueError, TypeError):
        raise ConfigError("--output", f"{made_with}, which says what {output} was made with, is damaged: remove both, "
                          "or choose another file") from None
    if unknown := facts.keys() - before.keys():
        raise ConfigError("--output", f"{made_with} does not say with which {' and '.join(sorted(unknown))} {output} "
                          f"was made: {otherwise}")
    if changed := [name for name, value in facts.items() if before[name] != value]:
        raise ConfigError("--output", f"{output} was made with another model, other documents or other settings "
                          f"({', '.join(changed)}): {otherwise}")


def _document(line: bytes, place: str) -> int:
    try:
        return json.loads(line)["document"]
    except (ValueError, LookupError, TypeError):
        raise DataError(f"{place}: is no text that this tool wrote: remove the line or the file") from None
