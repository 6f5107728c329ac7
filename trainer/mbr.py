"""Minimum Bayes risk: of several texts for one source, the one that the others agree with most."""

from __future__ import annotations

from collections.abc import Sequence

from sacrebleu.metrics import BLEU

_BLEU = BLEU(effective_order=True)  # as sacrebleu's own sentence_bleu


def utilities(texts: Sequence[str]) -> list[float]:
    """Mean sentence BLEU (0 to 100) of each text as hypothesis against each of the others as reference (Kumar & Byrne
    2004, with the candidates as both; as DiffuSeq does). 0 for a single text."""
    count = len(texts)
    return [sum(_BLEU.sentence_score(text, [other]).score for j, other in enumerate(texts) if j != i)
            / max(1, count - 1) for i, text in enumerate(texts)]


def choose(texts: Sequence[str]) -> int:
    """Index of the text of highest utility, the first of equals."""
    scores = utilities(texts)
    return scores.index(max(scores))
