"""What trivial systems write for the same documents: every score belongs beside theirs.

Copying the source, its first words, and the greedy extractive oracle, which picks sentences of the source with sight
of the reference and so bounds what copying can reach.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

import numpy as np

from tools.scoring.overlap import TOKENIZER, sentences
from tools.scoring.variety import ngrams


def median_words(texts: Sequence[str]) -> int:
    """Median number of words: the length that the lead baseline is given."""
    return round(statistics.median(len(text.split()) for text in texts))


def lead(source: str, words: int) -> str:
    """The source's first `words` words."""
    return " ".join(source.split()[:words])


def oracle(source: str, reference: str) -> str:
    """The greedy extractive oracle: adds the sentence that raises ROUGE-1 F + ROUGE-2 F most, until none does;
    the chosen sentences in the order of the source.

    Counts of n-grams are clipped as ROUGE clips them; pairs of words across two chosen sentences do not count.
    """
    parts = sentences(source)
    tokens = [TOKENIZER.tokenize(part) for part in parts]
    wanted = TOKENIZER.tokenize(reference)
    if not parts or not wanted:
        return ""
    grams = [_Overlap(tokens, wanted, n) for n in (1, 2)]
    chosen, best = [], 0.0
    while len(chosen) < len(parts):
        gain = sum(each.f_with_each() for each in grams)
        gain[chosen] = 0.0
        pick = int(gain.argmax())
        if gain[pick] <= best:
            break
        best = gain[pick]
        chosen.append(pick)
        for each in grams:
            each.add(pick)
    return " ".join(parts[pick] for pick in sorted(chosen))


class _Overlap:
    """n-grams that a growing choice of sentences shares with the reference.

    Letters: S sentences, G different n-grams of the reference.
    """

    def __init__(self, tokens: list[list[str]], wanted: list[str], n: int):
        reference = Counter(ngrams(wanted, n))
        column = {gram: g for g, gram in enumerate(reference)}
        self.wanted_G = np.fromiter(reference.values(), dtype=np.int64, count=len(reference))
        self.count_SG = np.zeros((len(tokens), len(reference)), dtype=np.int64)
        self.length_S = np.array([max(len(each) - n + 1, 0) for each in tokens])
        for s, each in enumerate(tokens):
            for gram in ngrams(each, n):
                if gram in column:
                    self.count_SG[s, column[gram]] += 1
        self.chosen_G = np.zeros_like(self.wanted_G)
        self.chosen_length = 0

    def f_with_each(self) -> np.ndarray:
        """F-measure of the choice with each sentence added to it, [S]."""
        hits_S = np.minimum(self.chosen_G + self.count_SG, self.wanted_G).sum(1)
        return 2 * hits_S / np.maximum(self.length_S + self.chosen_length + self.wanted_G.sum(), 1)

    def add(self, sentence: int) -> None:
        self.chosen_G += self.count_SG[sentence]
        self.chosen_length += int(self.length_S[sentence])


def baselines(sources: Sequence[str], references: Sequence[Sequence[str]], words: int) -> dict[str, list[str]]:
    """What each trivial system writes, by its name. words: length of the lead, `median_words` of the references. The
    oracle looks at the first of several references."""
    return {"copy of the source": list(sources),
            f"first {words} words": [lead(source, words) for source in sources],
            "greedy extractive oracle": [oracle(source, alternatives[0])
                                         for source, alternatives in zip(sources, references, strict=True)]}
