"""Short answers and labels: right or wrong, after SQuAD's normalisation (Rajpurkar et al. 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Small letters, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(output: str, references: Sequence[str]) -> float:
    """100 where the output is one of the references, else 0."""
    return 100.0 * (normalize(output) in map(normalize, references))


def token_f1(output: str, references: Sequence[str]) -> float:
    """F-measure of words shared with the reference that suits best, in percent. Where neither has a word it is 100."""
    return 100 * max(_f1(normalize(output).split(), normalize(each).split()) for each in references)


def _f1(output: list[str], reference: list[str]) -> float:
    if not output or not reference:
        return float(output == reference)
    shared = (Counter(output) & Counter(reference)).total()
    return 2 * shared / (len(output) + len(reference))
