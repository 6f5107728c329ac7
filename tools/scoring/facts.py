"""Sets of facts to a sentence, as in E2E NLG (`name[Aromi], food[Chinese]`): their texts, and whether they are said."""

from __future__ import annotations

import re
from collections.abc import Sequence

Facts = list[tuple[str, str]]
"""(slot, value) pairs."""

COVERED = ("name", "near", "food", "eattype", "area")
"""Slots whose values stand word for word in a sentence that says them; others are paraphrased."""


def words(text: str) -> str:
    """Lower-cased, with punctuation set apart."""
    return " ".join(re.findall(r"£?\w+|[^\w\s]", text.lower()))


def facts(source: str) -> Facts:
    """The pairs of `name[Aromi], food[Chinese]`; empty where there are none."""
    return [(slot.strip().lower(), words(value)) for slot, value in re.findall(r"([\w ]+?)\[(.*?)\]", source)]


def source_text(pairs: Facts) -> str:
    """The pairs as a model is given them."""
    return " , ".join(f"{slot} {value}" for slot, value in pairs)


def coverage(outputs: Sequence[str], asked: Sequence[Facts]) -> float | None:
    """Share of the values of COVERED slots that stand word for word in their sentence; None if no such slot is
    asked for."""
    hits = [f" {value} " in f" {output} " for output, pairs in zip(outputs, asked, strict=True)
            for slot, value in pairs if slot in COVERED]
    return sum(hits) / len(hits) if hits else None


def nearest(asked: Sequence[Facts], known: Sequence[tuple[Facts, str]]) -> list[str]:
    """For each set of facts, the sentence of the known facts that share most with it; of several the shortest facts'.
    A system that only looks up."""
    return [max(known, key=lambda pair: (len(set(pairs) & set(pair[0])), -len(pair[0])))[1] for pairs in asked]
