"""Whether a text invents: its numbers and names that the source does not have."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_NAME = re.compile(r"(?<![.!?\n] )(?<!^)\b[A-Z]\w+", re.MULTILINE)


def checkable(text: str) -> list[str]:
    """Numbers, and words with a capital that do not begin a sentence or a line."""
    return _NUMBER.findall(text) + _NAME.findall(text)


def supported(outputs: Sequence[str], sources: Sequence[str]) -> float | None:
    """Share, in percent, of all numbers and names of all outputs that stand in the output's source, whatever the case
    of their letters; None where the outputs have none."""
    found = [item.lower() in set(re.findall(r"\w+(?:[.,]\d+)*", source.lower()))
             for output, source in zip(outputs, sources, strict=True) for item in checkable(output)]
    return 100 * sum(found) / len(found) if found else None
