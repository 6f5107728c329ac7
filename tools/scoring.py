"""How good generated texts are, and how good trivial systems would be on the same documents.

ROUGE is that of the `rouge-score` package with stemming, F-measure, averaged over documents, times 100. Two
baselines belong beside every system: the source's first words, and the greedy extractive oracle, which picks
sentences of the source with sight of the reference and so bounds what copying can reach.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer, tokenize

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


class _Tokenizer:
    """rouge-score's own tokens, with stems that are remembered: most of ROUGE's time would go into them."""

    def __init__(self) -> None:
        self.stem = functools.lru_cache(maxsize=1 << 18)(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        return tokenize.tokenize(text, self)


_TOKENIZER = _Tokenizer()
_SCORER = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_TOKENIZER)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A system's outputs against one reference each. ROUGE and distinct-n are in percent."""

    documents: int
    rouge1: float
    rouge2: float
    rougeL: float
    distinct1: float
    """Different words among all words of all outputs."""
    distinct2: float
    """Different pairs of neighbouring words among all such pairs of all outputs."""
    words: float
    """Mean number of words of an output."""
    empty: int
    """Outputs without a word. They score 0 in ROUGE."""
    short: int
    """Outputs with a word, but less than a quarter of their reference's words."""


def score(outputs: Sequence[str], references: Sequence[str]) -> Scores:
    """Scores of `outputs` against the `references` in the same order; ValueError unless there are as many of
    both, and one at least."""
    if len(outputs) != len(references) or not outputs:
        raise ValueError(f"{len(outputs)} outputs for {len(references)} references: need as many of each")
    rouge = [_SCORER.score(reference, output) for output, reference in zip(outputs, references, strict=True)]
    mean = {name: 100 * statistics.fmean(each[name].fmeasure for each in rouge) for name in rouge[0]}
    lengths = [len(output.split()) for output in outputs]
    short = sum(0 < 4 * length < len(reference.split())
                for length, reference in zip(lengths, references, strict=True))
    return Scores(documents=len(outputs), rouge1=mean["rouge1"], rouge2=mean["rouge2"], rougeL=mean["rougeL"],
                  distinct1=distinct(outputs, 1), distinct2=distinct(outputs, 2), words=statistics.fmean(lengths),
                  empty=lengths.count(0), short=short)


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words among all n-grams of all texts, in percent; 0 where there are none."""
    seen, total = set(), 0
    for text in texts:
        words = text.split()
        grams = list(zip(*(words[i:] for i in range(n)), strict=False))
        seen.update(grams)
        total += len(grams)
    return 100 * len(seen) / total if total else 0.0


def median_words(texts: Sequence[str]) -> int:
    """Median number of words: the length that the lead baseline is given, from the targets of the training set."""
    return round(statistics.median(len(text.split()) for text in texts))


def lead(source: str, words: int) -> str:
    """The source's first `words` words."""
    return " ".join(source.split()[:words])


def sentences(text: str) -> list[str]:
    """The text's sentences and lines that hold a letter or digit. A sentence ends at . ! or ? before space."""
    return [part for part in _SENTENCE_END.split(text) if re.search(r"\w", part)]


def oracle(source: str, reference: str) -> str:
    """The greedy extractive oracle: adds the sentence that raises ROUGE-1 F + ROUGE-2 F most, until none does;
    the chosen sentences in the order of the source.

    Counts of n-grams are clipped as ROUGE clips them; pairs of words across two chosen sentences do not count.
    """
    parts = sentences(source)
    tokens = [_TOKENIZER.tokenize(part) for part in parts]
    wanted = _TOKENIZER.tokenize(reference)
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
        reference = Counter(_ngrams(wanted, n))
        column = {gram: g for g, gram in enumerate(reference)}
        self.wanted_G = np.fromiter(reference.values(), dtype=np.int64, count=len(reference))
        self.count_SG = np.zeros((len(tokens), len(reference)), dtype=np.int64)
        self.length_S = np.array([max(len(each) - n + 1, 0) for each in tokens])
        for s, each in enumerate(tokens):
            for gram in _ngrams(each, n):
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


def _ngrams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def baselines(sources: Sequence[str], references: Sequence[str], words: int) -> dict[str, Scores]:
    """Scores of the trivial systems, by name. words: length of the lead, `median_words` of training targets."""
    extracts = [oracle(source, reference) for source, reference in zip(sources, references, strict=True)]
    return {f"first {words} words": score([lead(source, words) for source in sources], references),
            "greedy extractive oracle": score(extracts, references)}


def to_markdown(systems: Mapping[str, Scores]) -> str:
    """A Markdown table with one row for each system."""
    rows = [("system", "documents", "R1", "R2", "RL", "distinct-1", "distinct-2", "words", "empty", "short"),
            ("---", *["---:"] * 9)]
    for name, scores in systems.items():
        values = asdict(scores).values()
        rows.append((name, *(f"{value:.1f}" if isinstance(value, float) else str(value) for value in values)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def to_json(systems: Mapping[str, Scores]) -> str:
    """The same as a JSON object by system name, with all digits."""
    return json.dumps({name: asdict(scores) for name, scores in systems.items()}, indent=2) + "\n"
