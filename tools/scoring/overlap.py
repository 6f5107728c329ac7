"""How much of its reference a text has: ROUGE and two kinds of BLEU, all in percent.

ROUGE is that of the `rouge-score` package with stemming, F-measure. BLEU is sacrebleu's corpus BLEU; beside it the
mean sentence BLEU that the DiffuSeq papers report, which is not comparable to it.
"""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Sequence

import numpy as np
import sacrebleu
from nltk.stem.porter import PorterStemmer
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score import rouge_scorer, tokenize

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


class _Tokenizer:
    """rouge-score's own tokens, with stems that are remembered: most of ROUGE's time would go into them."""

    def __init__(self) -> None:
        self.stem = functools.lru_cache(maxsize=1 << 18)(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        return tokenize.tokenize(text, self)


TOKENIZER = _Tokenizer()
_SCORER = rouge_scorer.RougeScorer(list(ROUGE), tokenizer=TOKENIZER)


def sentences(text: str) -> list[str]:
    """The text's sentences and lines that hold a letter or digit. A sentence ends at . ! or ? before space."""
    return [part for part in _SENTENCE_END.split(text) if re.search(r"\w", part)]


def rouge(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """F-measures of each document by name of ROUGE; of several references the one that suits each measure best.
    ROUGE-Lsum takes `sentences` apart, the others the text as a whole."""
    found: dict[str, list[float]] = {name: [] for name in ROUGE}
    for output, alternatives in zip(outputs, references, strict=True):
        lines = "\n".join(sentences(output))
        best = _SCORER.score_multi(["\n".join(sentences(each)) for each in alternatives], lines)
        for name in ROUGE:
            found[name].append(100 * best[name].fmeasure)
    return found


def corpus_bleu(outputs: Sequence[str], references: Sequence[Sequence[str]], tokenize: str = "13a") -> float:
    """sacrebleu's BLEU (exponential smoothing) of all outputs together. Where documents have unequal numbers of
    references, the missing ones are empty and match nothing. tokenize: how words are found, as sacrebleu names it;
    `none` for texts whose words stand between spaces already."""
    most = max(map(len, references))
    streams = [[each[k] if k < len(each) else None for each in references] for k in range(most)]
    return sacrebleu.corpus_bleu(list(outputs), streams, tokenize=tokenize, force=True).score


def bleu_counts(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """What `corpus_bleu` adds up, one row a document [D, 10]: matches and n-grams of each order, words of the output
    and of the reference that is nearest in length. Sums of rows go to `bleu_of`."""
    judge = sacrebleu.BLEU(effective_order=True)  # of sentences' own scores, which are not used; silences a warning
    scores = [judge.sentence_score(output, list(alternatives))
              for output, alternatives in zip(outputs, references, strict=True)]
    return np.array([[*each.counts, *each.totals, each.sys_len, each.ref_len] for each in scores], dtype=np.int64)


def bleu_of(counts: np.ndarray) -> float:
    """`corpus_bleu` of the documents whose rows of `bleu_counts` were added up to `counts` [10]."""
    matches, totals, (words, wanted) = counts[:4].tolist(), counts[4:8].tolist(), counts[8:].tolist()
    return sacrebleu.BLEU.compute_bleu(matches, totals, words, wanted, smooth_method="exp").score


def sentence_bleu_mean(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of the DiffuSeq papers: NLTK's sentence BLEU, smoothing method 4, on words between spaces, averaged."""
    smooth = SmoothingFunction().method4
    return 100 * statistics.fmean(
        sentence_bleu([each.split() for each in alternatives], output.split(), smoothing_function=smooth)
        for output, alternatives in zip(outputs, references, strict=True))
