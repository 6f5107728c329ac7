"""How varied texts are, within and among themselves; nothing here looks at references. In percent."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from trainer.data.evaluation import evaluation_samples

_ORDERS = (1, 2, 3, 4)
_SELF_BLEU_TEXTS = 200


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words among all n-grams of all texts; 0 where there are none (Li et al. 2016)."""
    grams = [gram for text in texts for gram in ngrams(text.split(), n)]
    return 100 * len(set(grams)) / len(grams) if grams else 0.0


def repetition(text: str, n: int = 4) -> float:
    """n-grams of a text that stood in it before, among all of its n-grams; 0 where there are none."""
    grams = ngrams(text.split(), n)
    return 100 * (1 - len(set(grams)) / len(grams)) if grams else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU-4 of each text with all others as its references (Zhu et al. 2018): 100 where all are alike.

    Words between spaces; a precision without a match counts as 0.1 matches (NLTK's smoothing method 1). Of more than
    200 texts, 200 that are spread evenly. 0 for fewer than two texts.
    """
    words = [texts[place].split() for place in evaluation_samples(len(texts), _SELF_BLEU_TEXTS)]
    if len(words) < 2:
        return 0.0
    counts = {n: [Counter(ngrams(each, n)) for each in words] for n in _ORDERS}
    most = {n: _two_largest(counts[n]) for n in _ORDERS}
    lengths = Counter(map(len, words))
    return 100 * statistics.fmean(_bleu(place, len(each), counts, most, lengths) for place, each in enumerate(words))


def _two_largest(counts: Sequence[Counter]) -> dict[tuple, tuple[int, int, int]]:
    """Of every n-gram (largest count, whose it is, second largest): what all texts but one have follows at once."""
    found: dict[tuple, tuple[int, int, int]] = {}
    for place, counter in enumerate(counts):
        for gram, count in counter.items():
            first, owner, second = found.get(gram, (0, -1, 0))
            found[gram] = (count, place, first) if count > first else (first, owner, max(second, count))
    return found


def _bleu(place: int, length: int, counts: dict, most: dict, lengths: Counter) -> float:
    logs = []
    for n in _ORDERS:
        mine = counts[n][place]
        matches = sum(min(count, most[n][gram][2 if most[n][gram][1] == place else 0]) for gram, count in mine.items())
        if n == 1 and not matches:
            return 0.0
        logs.append(math.log((matches or 0.1) / max(1, length - n + 1)))
    others = lengths - Counter([length])
    closest = min(others, key=lambda other: (abs(other - length), other))
    brevity = 1.0 if length > closest else math.exp(1 - closest / length)
    return brevity * math.exp(statistics.fmean(logs))
