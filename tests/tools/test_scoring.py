"""Scores against recorded figures of the packages and scripts that others use, brute force, and known figures."""

import gzip
import json
import random
import statistics
from pathlib import Path

import numpy as np
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score import rouge_scorer

from model.errors import ConfigError
from tests.trainer.launching import ROOT
from tools.scoring import answers, baselines, bootstrap, overlap, variety
from tools.scoring.embeddings import Encoder, longest_input
from tools.scoring.systems import score, to_json, to_markdown

RECORDED = json.loads((ROOT / "tests" / "data" / "text_metrics.json").read_text())


def read(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def texts():
    """Sources and references of the first 200 test documents of the bundled corpus."""
    documents = read(ROOT / "data" / "proposals" / "test.jsonl.gz")[:200]
    return [d["src"] for d in documents], [[d["trg"]] for d in documents]


@pytest.fixture(scope="module")
def pairs():
    return ([pair["hypothesis"] for pair in RECORDED["pairs"]], [[pair["reference"]] for pair in RECORDED["pairs"]])


def test_recorded_scores_of_the_usual_packages(pairs):
    found = overlap.rouge(*pairs)
    for name in ("rouge1", "rouge2", "rougeL"):
        expected = RECORDED["means"]["rouge_stemming"][name]["fmeasure"]
        assert statistics.fmean(found[name]) == pytest.approx(100 * expected, abs=1e-9)
    assert overlap.corpus_bleu(*pairs) == pytest.approx(RECORDED["sacrebleu"]["score"], abs=1e-9)
    assert overlap.sentence_bleu_mean(*pairs) == pytest.approx(100 * RECORDED["means"]["sentence_bleu_method4"])


def test_rouge_of_another_systems_outputs():
    """Outputs of HMNet on QMSum: R1 35.97, R2 11.47, Lsum 31.48 and L 22.66 by rouge-score."""
    records = read(ROOT / "tests" / "data" / "rouge_qmsum.jsonl.gz")
    found = overlap.rouge([each["prediction"] for each in records], [[each["reference"]] for each in records])
    means = [statistics.fmean(found[name]) for name in ("rouge1", "rouge2", "rougeLsum", "rougeL")]
    assert means == pytest.approx([35.97, 11.47, 31.48, 22.66], abs=0.05)


def test_equals_rouge_score_with_its_own_stemmer(texts):
    sources, references = (part[:12] for part in texts)
    outputs = [baselines.lead(source, 60) for source in sources]
    judge = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    found = overlap.rouge(outputs, references)
    for place, (output, (reference,)) in enumerate(zip(outputs, references, strict=True)):
        for name, expected in judge.score(reference, output).items():
            assert found[name][place] == pytest.approx(100 * expected.fmeasure, abs=1e-9)


def test_the_best_of_several_references_counts():
    outputs, references = ["the cat sat", "a dog"], [["no match here", "the cat sat"], ["a dog ran"]]
    found = score(outputs, references)
    alone = score(outputs, [references[0][1:], references[1]])
    assert found.by_document["rouge1"] == alone.by_document["rouge1"]
    assert found.by_document["rouge1"][0] == pytest.approx(100)
    assert overlap.corpus_bleu(["the cat sat on it"] * 2, [["x y z", "the cat sat on it"], ["the cat sat on it"]]
                               ) == pytest.approx(100)


def test_lead_baseline_has_the_known_scores(texts):
    """70 words of the first 200 test documents: 30.2 / 7.2 / 18.0."""
    sources, references = texts
    values = score([baselines.lead(source, 70) for source in sources], references).values
    assert [values[name] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx([30.2, 7.2, 18.0], abs=0.1)
    assert [values[name] for name in ("documents", "words", "empty", "short")] == [200, 70.0, 0, 0]


def test_oracle_is_far_above_the_lead(texts):
    sources, references = texts
    written = baselines.baselines(sources, references, 70)
    lead, oracle = (overlap.rouge(written[name], references) for name in ("first 70 words", "greedy extractive oracle"))
    assert statistics.fmean(oracle["rouge1"]) > statistics.fmean(lead["rouge1"]) + 20
    assert statistics.fmean(oracle["rouge2"]) > 2 * statistics.fmean(lead["rouge2"])
    assert written["copy of the source"] == sources


def test_oracle_takes_the_best_sentence_at_each_turn():
    source = "The cat sat. A dog ran away fast! Rain fell on the mat.\nThe cat sat on a mat in the rain."
    reference = "The cat sat on a mat. The dog ran away."
    parts = overlap.sentences(source)
    assert len(parts) == 4

    def value(chosen):
        """R1 + R2, n-grams within sentences only, counted with plain loops."""
        total = 0.0
        wanted = overlap.TOKENIZER.tokenize(reference)
        for n in (1, 2):
            def grams(tokens, n=n):
                return [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]
            have = [g for i in chosen for g in grams(overlap.TOKENIZER.tokenize(parts[i]))]
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
    assert baselines.oracle(source, reference) == " ".join(parts[i] for i in sorted(chosen))
    assert len(chosen) == 2


@pytest.mark.parametrize("source, reference", [("", "A reference."), ("A source.", ""), ("One two.", "Three four.")])
def test_oracle_of_nothing_in_common_is_empty(source, reference):
    assert baselines.oracle(source, reference) == ""


def test_self_bleu_equals_nltk():
    rng = random.Random(0)
    written = [" ".join(rng.choices("abcde", k=rng.randint(1, 12))) for _ in range(30)] + ["", "q", "a b a b a b"]
    smooth = SmoothingFunction().method1
    expected = [sentence_bleu([other.split() for j, other in enumerate(written) if j != i], text.split(),
                              smoothing_function=smooth) for i, text in enumerate(written)]
    assert variety.self_bleu(written) == pytest.approx(100 * statistics.fmean(expected), abs=1e-9)


def test_self_bleu_of_one_text_and_of_many_alike():
    assert variety.self_bleu(["a b c d e"]) == 0.0
    assert variety.self_bleu(["a b c d e"] * 1000) == pytest.approx(100)
    texts = [f"{number} {number} b c d e f"[number % 5:] for number in range(300)]
    assert variety.self_bleu(texts) == pytest.approx(variety.self_bleu([texts[n * 300 // 200] for n in range(200)]))


def test_distinct_and_repetition():
    assert variety.distinct(["a b a", "b a"], 1) == pytest.approx(100 * 2 / 5)
    assert variety.distinct(["a b a", "b a"], 2) == pytest.approx(100 * 2 / 3)
    assert variety.distinct(["", "a"], 2) == 0.0
    assert variety.repetition("a b c d a b c d") == pytest.approx(100 / 5)
    assert variety.repetition("a b c") == 0.0


@pytest.mark.parametrize("output, references, exact, f1", [
    ("The Cat.", ["cat"], 100, 100), ("a black cat", ["the cat"], 0, 200 / 3), ("", ["the"], 100, 100),
    ("", ["dog"], 0, 0), ("cat cat", ["cat dog"], 0, 50), ("no", ["dog", "no!"], 100, 100)])
def test_short_answers(output, references, exact, f1):
    assert answers.exact_match(output, references) == exact
    assert answers.token_f1(output, references) == pytest.approx(f1)


def test_tasks_add_their_measures():
    given = (["yes", "no"], [["Yes."], ["yes"]])
    assert "f1" not in score(*given).values
    assert score(*given, task="answers").values["exact_match"] == 50
    assert score(*given, task="labels").values["accuracy"] == 50


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        mean, low, high = bootstrap.interval(rng.normal(3, 2, size=60), 300)
        assert low < mean < high
        hits += low < 3 < high
    assert 180 <= hits <= 200  # 95 %, a little less for so few documents


def test_a_paired_difference_is_surer_than_two_intervals():
    rng = np.random.default_rng(0)
    base = rng.normal(30, 10, size=100)
    better = base + rng.normal(1, 1, size=100)
    mean, low, _ = bootstrap.difference(better, base)
    assert mean == pytest.approx((better - base).mean()) and low > 0
    assert bootstrap.interval(better).low < bootstrap.interval(base).high
    assert bootstrap.difference(base, better).high == pytest.approx(-low)


def test_counts_empty_and_short_outputs():
    reference = ["one two three four five six seven eight"]
    values = score(["", "  \n", "one", "one two", reference[0]], [reference] * 5).values
    assert (values["empty"], values["short"]) == (2, 1)
    assert values["rouge1"] == pytest.approx(100 * (0 + 0 + 2 / 9 + 4 / 10 + 1) / 5)
    assert values["length_ratio"] == pytest.approx((0 + 0 + 1 + 2 + 8) / 40)


def test_median_words():
    assert baselines.median_words(["a", "a b c", "a b"]) == 2


def test_numbers_of_outputs_and_references_must_agree():
    with pytest.raises(ValueError, match="1 outputs for 2 references"):
        score(["a"], [["a"], ["b"]])


def test_tables():
    systems = {"copy": score(["a b c d"] * 4, [["a b c d"]] * 4)}
    head, _, row = to_markdown(systems).splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert cells == {"system": "copy", "documents": "4", "R1": "100.0 ± 0.0", "R2": "100.0 ± 0.0",
                     "RL": "100.0 ± 0.0", "RLsum": "100.0 ± 0.0", "BLEU": "100.0", "sBLEU": "100.0",
                     "distinct-1": "25.0", "distinct-2": "25.0", "self-BLEU": "100.0", "repeated": "0.0 ± 0.0",
                     "words": "4.0", "length": "1.00", "empty": "0", "short": "0"}
    written = json.loads(to_json(systems))["copy"]
    assert written["rougeL"] == pytest.approx(100) and written["intervals"]["rougeL"] == pytest.approx([100, 100])


POSITIONS = 16


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """Makes the folder of a small encoder of a family."""
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
             "max_position_embeddings": POSITIONS, "pad_token_id": 0}
    families = {"Bert": sizes, "Roberta": sizes, "MPNet": sizes,
                "T5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}}

    def make(family):
        folder = tmp_path_factory.mktemp(family)
        (folder / "vocab.txt").write_text("\n".join(words))
        transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_input_names=["input_ids", "attention_mask"]
                                       ).save_pretrained(folder)
        config = getattr(transformers, f"{family}Config")(vocab_size=len(words), **families[family])
        getattr(transformers, f"{family}Model")(config).save_pretrained(folder)
        return folder
    return make


def test_similarity_by_an_encoder_on_disk(encoder_folder):
    outputs, references = ["a b c", "a b", "", "a " * 40], [["a b c"], ["g h", "a b"], ["a"], ["a"]]
    found = score(outputs, references, encoder=Encoder(encoder_folder("Bert"))).by_document["similarity"]
    assert found[:2] == pytest.approx([100, 100], abs=1e-3) and found[2] < 100 and found[3] > 0


@pytest.mark.parametrize("family, longest", [("Bert", POSITIONS), ("Roberta", POSITIONS - 1), ("MPNet", POSITIONS - 2),
                                             ("T5", 512)])
def test_encoders_are_given_as_many_tokens_as_they_take(encoder_folder, family, longest):
    encoder = Encoder(encoder_folder(family))
    assert encoder.longest == longest
    assert encoder.vector("a " * 600).isfinite().all()
    encoder.tokenizer.model_max_length = 9
    assert longest_input(encoder.tokenizer, encoder.model) == 9


def test_a_folder_without_encoder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no encoder with its tokenizer"):
        Encoder(tmp_path)
