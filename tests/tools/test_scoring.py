"""Scores against rouge-score itself, brute force, and known figures on the bundled test documents."""

import gzip
import itertools
import json
import time
from pathlib import Path

import pytest
from rouge_score import rouge_scorer

from tools import scoring

PROPOSALS = Path(__file__).resolve().parents[2] / "data" / "proposals" / "test.jsonl.gz"


@pytest.fixture(scope="module")
def documents():
    with gzip.open(PROPOSALS, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, 200)]


@pytest.fixture(scope="module")
def texts(documents):
    return [d["src"] for d in documents], [d["trg"] for d in documents]


def test_equals_rouge_score_with_its_own_stemmer(texts):
    sources, references = (part[:12] for part in texts)
    outputs = [scoring.lead(source, 60) for source in sources]
    judge = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    each = [judge.score(reference, output) for reference, output in zip(references, outputs, strict=True)]
    ours = scoring.score(outputs, references)
    for name in ("rouge1", "rouge2", "rougeL"):
        expected = 100 * sum(result[name].fmeasure for result in each) / len(each)
        assert getattr(ours, name) == pytest.approx(expected, abs=1e-9)


def test_lead_baseline_has_the_known_scores(texts):
    """70 words of the first 200 test documents: 30.2 / 7.2 / 18.0."""
    sources, references = texts
    scores = scoring.score([scoring.lead(source, 70) for source in sources], references)
    assert (scores.rouge1, scores.rouge2, scores.rougeL) == pytest.approx((30.2, 7.2, 18.0), abs=0.1)
    assert (scores.documents, scores.words, scores.empty, scores.short) == (200, 70.0, 0, 0)


def test_oracle_is_far_above_the_lead_and_fast(texts):
    sources, references = texts
    started = time.process_time()
    scores = scoring.baselines(sources, references, 70)
    lead, oracle = scores["first 70 words"], scores["greedy extractive oracle"]
    assert oracle.rouge1 > lead.rouge1 + 20 and oracle.rouge2 > 2 * lead.rouge2
    assert (time.process_time() - started) / len(sources) < 0.06


def test_oracle_takes_the_best_sentence_at_each_turn():
    source = "The cat sat. A dog ran away fast! Rain fell on the mat.\nThe cat sat on a mat in the rain."
    reference = "The cat sat on a mat. The dog ran away."
    parts = scoring.sentences(source)
    assert len(parts) == 4

    def value(chosen):
        """R1 + R2, n-grams within sentences only, counted with plain loops."""
        total = 0.0
        wanted = scoring._TOKENIZER.tokenize(reference)
        for n in (1, 2):
            def grams(tokens, n=n):
                return [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]
            have = [g for i in chosen for g in grams(scoring._TOKENIZER.tokenize(parts[i]))]
            left, hits = grams(wanted), 0
            for gram in have:
                if gram in left:
                    left.remove(gram)
                    hits += 1
            total += 2 * hits / (len(have) + len(grams(wanted)))
        return total

    chosen = []
    while True:
        best = max((value([*chosen, i]), -i) for i in range(4) if i not in chosen)
        if best[0] <= (value(chosen) if chosen else 0.0):
            break
        chosen.append(-best[1])
    assert scoring.oracle(source, reference) == " ".join(parts[i] for i in sorted(chosen))
    assert len(chosen) == 2


@pytest.mark.parametrize("source, reference", [("", "A reference."), ("A source.", ""), ("One two.", "Three four.")])
def test_oracle_of_nothing_in_common_is_empty(source, reference):
    assert scoring.oracle(source, reference) == ""


def test_counts_empty_and_short_outputs():
    reference = "one two three four five six seven eight"
    scores = scoring.score(["", "  \n", "one", "one two", reference], [reference] * 5)
    assert (scores.empty, scores.short) == (2, 1)
    assert scores.rouge1 == pytest.approx(100 * (0 + 0 + 2 / 9 + 4 / 10 + 1) / 5)


def test_distinct():
    assert scoring.distinct(["a b a", "b a"], 1) == pytest.approx(100 * 2 / 5)
    assert scoring.distinct(["a b a", "b a"], 2) == pytest.approx(100 * 2 / 3)
    assert scoring.distinct(["", "a"], 2) == 0.0


def test_median_words():
    assert scoring.median_words(["a", "a b c", "a b"]) == 2


def test_numbers_of_outputs_and_references_must_agree():
    with pytest.raises(ValueError, match="1 outputs for 2 references"):
        scoring.score(["a"], ["a", "b"])


def test_tables():
    scores = {"copy": scoring.score(["a b c"], ["a b c"])}
    row = scoring.to_markdown(scores).splitlines()[2]
    assert row == "| copy | 1 | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 | 3.0 | 0 | 0 |"
    assert json.loads(scoring.to_json(scores))["copy"]["rougeL"] == 100.0
