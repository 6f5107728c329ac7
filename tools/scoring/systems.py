"""A system's scores, from its texts to one row of a table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tools.scoring import answers, variety
from tools.scoring.bootstrap import RESAMPLES, Interval, interval
from tools.scoring.columns import COLUMNS
from tools.scoring.embeddings import Encoder
from tools.scoring.overlap import corpus_bleu, rouge, sentence_bleu_mean

TASKS = ("text", "answers", "labels")
"""What outputs are: answers and labels are also right or wrong as a whole."""


@dataclass(frozen=True)
class Scores:
    """values: one number for each name in COLUMNS that applies. intervals: of those that are means over documents.
    by_document: what they are means of."""

    values: dict[str, float | int]
    intervals: dict[str, Interval]
    by_document: dict[str, list[float]]


def score(outputs: Sequence[str], references: Sequence[Sequence[str]], *, task: str = "text",
          encoder: Encoder | None = None, resamples: int = RESAMPLES) -> Scores:
    """Scores of one output for each document, of which each has one or more references; ValueError unless there are
    as many of both, and one at least.

    exact_match, f1, accuracy, rouge*, bleu, sentence_bleu, similarity, distinct*, self_bleu and repetition are in
    percent. words: mean of an output's words. length_ratio: all words of the outputs by all words of the (first)
    references. empty: outputs without a word. short: outputs with less than a quarter of their reference's words.
    """
    if len(outputs) != len(references) or not outputs:
        raise ValueError(f"{len(outputs)} outputs for {len(references)} references: need as many of each")
    pairs = list(zip(outputs, references, strict=True))
    means: dict[str, list[float]] = {}
    if task == "answers":
        means["exact_match"] = [answers.exact_match(*pair) for pair in pairs]
        means["f1"] = [answers.token_f1(*pair) for pair in pairs]
    elif task == "labels":
        means["accuracy"] = [answers.exact_match(*pair) for pair in pairs]
    means |= rouge(outputs, references)
    if encoder is not None:
        means["similarity"] = encoder.similarity(outputs, references)
    means["repetition"] = [variety.repetition(output) for output in outputs]
    intervals = {name: interval(values, resamples) for name, values in means.items()}

    lengths = [len(output.split()) for output in outputs]
    wanted = [len(alternatives[0].split()) for alternatives in references]
    values = {
        "documents": len(outputs), **{name: found.mean for name, found in intervals.items()},
        "bleu": corpus_bleu(outputs, references), "sentence_bleu": sentence_bleu_mean(outputs, references),
        "distinct1": variety.distinct(outputs, 1), "distinct2": variety.distinct(outputs, 2),
        "self_bleu": variety.self_bleu(outputs), "words": statistics.fmean(lengths),
        "length_ratio": sum(lengths) / max(1, sum(wanted)), "empty": lengths.count(0),
        "short": sum(0 < 4 * length < want for length, want in zip(lengths, wanted, strict=True))}
    return Scores({name: values[name] for name in COLUMNS if name in values}, intervals, means)


def to_markdown(systems: Mapping[str, Scores]) -> str:
    """A Markdown table with one row for each system; ± is half the width of a 95 % interval."""
    names = [name for name in COLUMNS if any(name in each.values for each in systems.values())]
    rows = [("system", *(COLUMNS[name] for name in names)), ("---", *["---:"] * len(names))]
    rows += [(system, *(_cell(each, name) for name in names)) for system, each in systems.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(scores: Scores, name: str) -> str:
    value = scores.values[name]
    if isinstance(value, int):
        return str(value)
    if name == "length_ratio":
        return f"{value:.2f}"
    if name not in scores.intervals:
        return f"{value:.1f}"
    _, low, high = scores.intervals[name]
    return f"{value:.1f} ± {(high - low) / 2:.1f}"


def to_json(systems: Mapping[str, Scores]) -> str:
    """The same as a JSON object by system name, with all digits; `intervals` holds [low, high]."""
    return json.dumps({system: {**each.values, "intervals": {name: [found.low, found.high]
                                                             for name, found in each.intervals.items()}}
                       for system, each in systems.items()}, indent=2) + "\n"
