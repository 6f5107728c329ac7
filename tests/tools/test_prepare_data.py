import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from model.errors import ConfigError
from tests.trainer.launching import ROOT
from tools import prepare_data
from tools.command import run
from tools.preparing import selection
from tools.preparing.recipes import RECIPES
from tools.preparing.selection import SPLITS, Selection, fingerprints, joined, normalized
from trainer.config_load import load
from trainer.data import prepare as training
from trainer.data import records, token_cache
from trainer.data.records import Block, Fields
from trainer.data.token_cache import TokenCache
from trainer.data.vocabulary import Vocabulary, train_vocabulary
from trainer.data.workers import ALONE, local_workers
from trainer.errors import DataError

WORDS = ["".join(letters) for letters in np.random.default_rng(7).choice(list("abcdefghijklmnopqrst"), (300, 6))]


def text(number, count):
    random = np.random.default_rng(number)
    return " ".join(random.choice(WORDS, count).tolist()) + f" {number}"


DOCUMENTS = [{"src": text(i, 20 + i % 30), "trg": text(1000 + i, 5)} for i in range(150)]


def write(path, documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return str(path)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "small.model"
    train_vocabulary([document["src"] for document in DOCUMENTS], path, 330)
    return str(path)


@pytest.fixture
def prepare(tmp_path, vocabulary, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words, out="out", workers=ALONE):
        words = ["--vocabulary", vocabulary, *words] if "--vocab_size" not in words else list(words)
        prepare_data.prepare(prepare_data.build_parser().parse_args(["--out", str(tmp_path / out), *words]), workers)
        return tmp_path / out
    return run


def pairs(folder):
    """(source, target) of every document of a split."""
    cache, vocabulary = TokenCache(folder), Vocabulary(folder.parent / "vocabulary.model")
    numbers = range(len(cache))
    return list(zip(vocabulary.decode(cache.source(n) for n in numbers),
                    vocabulary.decode(cache.target(n) for n in numbers), strict=True))


def wanted(documents):
    return [(document["src"], document["trg"]) for document in documents]


def test_splits_given_as_files_are_tokenized_whole_and_in_order(prepare, tmp_path, capsys):
    parts = {"train": DOCUMENTS[:100], "valid": DOCUMENTS[100:120], "test": DOCUMENTS[120:]}
    words = [word for name, part in parts.items() for word in (f"--{name}", write(tmp_path / f"{name}.jsonl", part))]
    out = prepare(*words)
    assert {name: pairs(out / name) for name in parts} == {name: wanted(part) for name, part in parts.items()}
    assert not list(tmp_path.glob("out.*partial*"))
    said = capsys.readouterr().out
    assert "left out: 0 exact and 0 near" in said and 'train = "' in said
    assert prepare(*words) == out, "finished: found again"


def test_training_takes_the_folder(prepare, tmp_path):
    out = prepare("--train", write(tmp_path / "train.jsonl", DOCUMENTS), "--valid_percent", "20")
    run = load(file=out / "data.toml", overrides=["data.max_source_tokens=64", f"data.cache_dir={tmp_path / 'cache'}"])
    data = training.prepare(run.data)
    assert set(data.caches) == {"train", "valid"} and data.vocabulary.path == out / "vocabulary.model"
    assert run.data.vocab_size == data.vocabulary.size
    assert data.caches["train"].folders == (out / "train",) and not (tmp_path / "cache/tokens").exists()
    for train, valid in ((out / "train", out / "valid"), (out, out)):
        named = load(overrides=[f"data.train={train}", f"data.valid={valid}", "data.test=", "data.cache_dir=cache"])
        again = training.prepare(named.data)
        assert again.vocabulary.digest == data.vocabulary.digest, "the one beside the shards"
        assert {split: cache.folders for split, cache in again.caches.items()} == {
            split: cache.folders for split, cache in data.caches.items()}


def test_training_refuses_another_vocabulary_than_the_folders(prepare, tmp_path):
    out = prepare("--train", write(tmp_path / "train.jsonl", DOCUMENTS))
    train_vocabulary([document["trg"] for document in DOCUMENTS], tmp_path / "other.model", 325)
    run = load(file=out / "data.toml", overrides=["data.vocabulary=other.model", "data.cache_dir=cache"])
    with pytest.raises(ConfigError, match=r"data\.vocabulary: other\.model is not what data\.train was tokenized"):
        training.prepare(run.data)


@pytest.mark.parametrize("named", ["out", "out/valid"])
def test_a_split_that_is_not_there_or_damaged_is_not_taken_for_documents(prepare, tmp_path, named):
    out = prepare("--train", write(tmp_path / "train.jsonl", DOCUMENTS), "--valid_percent", "20")
    run = load(overrides=[f"data.train={out}", f"data.valid={named}", f"data.test={out}", "data.cache_dir=cache"])
    with pytest.raises(DataError, match=r"^data\.test: .*out has no whole test split: make it with tools/prepare_data"):
        training.prepare(run.data, splits=("test",))
    (shard,) = (out / "valid").glob("*.tokens")
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"^data\.valid: out has no whole valid split"):
        training.prepare(run.data, splits=("valid",))


def test_percentages_do_not_depend_on_other_documents(prepare, tmp_path):
    path = write(tmp_path / "all.jsonl", DOCUMENTS)
    out = prepare("--train", path, "--valid_percent", "20", "--test_percent", "10")
    parts = {name: set(pairs(out / name)) for name in SPLITS}
    assert sum(map(len, parts.values())) == 150 and set.union(*parts.values()) == set(wanted(DOCUMENTS))
    assert 15 < len(parts["valid"]) < 45 and 5 < len(parts["test"]) < 28
    fewer = prepare("--train", write(tmp_path / "some.jsonl", DOCUMENTS[::-2]), "--valid_percent", "20",
                    "--test_percent", "10", out="fewer")
    assert all(set(pairs(fewer / name)) <= parts[name] for name in SPLITS)


def test_one_source_never_goes_to_two_splits(prepare, tmp_path):
    documents = [{"src": f"{DOCUMENTS[i // 5]['src']}", "trg": f"answer {i}"} for i in range(150)]
    documents += [{"src": document["src"].upper() + " ", "trg": "other"} for document in documents[::5]]
    out = prepare("--train", write(tmp_path / "all.jsonl", documents), "--valid_percent", "30")
    train, valid = ({normalized(source) for source, _ in pairs(out / name)} for name in ("train", "valid"))
    assert train and valid and not train & valid


@pytest.mark.parametrize(("kind", "left"), [("keep", 9), ("exact", 5), ("near", 4)])
def test_duplicates_stay_where_they_matter_most(prepare, tmp_path, kind, left):
    long, short = DOCUMENTS[29], DOCUMENTS[0]
    again = {"src": "  " + long["src"].upper().replace(" ", "\n", 3), "trg": long["trg"]}
    changed = {"src": long["src"] + " truly", "trg": long["trg"]}
    train = [long, short, again, changed, DOCUMENTS[1], short]
    test = [again, {"src": "new " + text(5, 30), "trg": "x"}, again]
    out = prepare("--train", write(tmp_path / "train.jsonl", train), "--test", write(tmp_path / "test.jsonl", test),
                  "--duplicates", kind)
    counts = {name: len(TokenCache(out / name)) for name in ("train", "test")}
    assert sum(counts.values()) == left
    if kind != "keep":
        assert pairs(out / "test") == wanted(test[:2])
        assert pairs(out / "train") == wanted([short, *([changed] if kind == "exact" else []), DOCUMENTS[1]])
    facts = json.loads((out / "statistics.json").read_text())
    assert (facts["exact_duplicates"], facts["near_duplicates"]) == {"keep": (0, 0), "exact": (4, 0),
                                                                     "near": (4, 1)}[kind]


def test_near_duplicates_are_those_of_the_true_similarity():
    """MinHash against the exact Jaccard similarity of word 5-grams."""
    def shingles(words):
        return {tuple(words[start:start + 5]) for start in range(len(words) - 4)}

    random = np.random.default_rng(0)
    base = [str(word) for word in random.integers(0, 10_000, 400)]
    documents, similar = [base], []
    for changes in (0, 1, 2, 5, 40, 60, 100, 400):
        other = list(base)
        for place in random.choice(400, changes, replace=False):
            other[place] = f"changed{place}"
        documents.append(other)
        a, b = shingles(base), shingles(other)
        similar.append(len(a & b) / len(a | b))
    assert min(abs(value - 0.7) for value in similar) > 0.1, "clear cases only"
    block = Block("x", 1, [{"src": "", "trg": " ".join(words)} for words in documents], 1.0)
    prints = joined([fingerprints(block, Fields("src", "trg", "text"), near=True)])
    found = selection._near_duplicates(prints.similar_NP, 0.7)
    assert found.tolist() == [False, *(value > 0.7 for value in similar)]
    assert any(found) and not all(found[1:])


def test_selection_of_one_document_at_a_time_is_the_same():
    fields = Fields("src", "trg", "text")
    whole = joined([fingerprints(Block("x", 1, DOCUMENTS, 1.0), fields, near=False)])
    single = joined([fingerprints(Block("x", i + 1, [document], 1.0), fields, near=False)
                     for i, document in enumerate(DOCUMENTS)])
    assert all((a == b).all() for a, b in zip(whole[:3], single[:3], strict=True))
    rules = Selection("exact", shares=(0.1, 0.1))
    assert (rules.choose({"train": whole})["train"] == rules.choose({"train": single})["train"]).all()


def test_statistics_are_those_of_the_tokens(prepare, tmp_path):
    out = prepare("--train", write(tmp_path / "train.jsonl", DOCUMENTS[:40]), "--max_source_tokens", "60",
                  "--max_target_tokens", "12")
    facts = json.loads((out / "statistics.json").read_text())["splits"]["train"]
    encoded = Vocabulary(out / "vocabulary.model").encode([document["src"] for document in DOCUMENTS[:40]])
    lengths = sorted(map(len, encoded))
    assert facts["documents"] == 40 and facts["source"]["tokens"] == sum(lengths)
    assert facts["source"]["max"] == lengths[-1] and facts["source"]["median"] == lengths[19]
    assert facts["source"]["cut"] == sum(length + 2 > 60 for length in lengths) > 0


def test_plot_is_an_svg_of_its_own(prepare, tmp_path):
    out = prepare("--train", write(tmp_path / "train.jsonl", DOCUMENTS), "--test_percent", "20",
                  "--max_target_tokens", "30")
    root = ElementTree.parse(out / "lengths.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert titles.count("train") == titles.count("test") == 2, "a line for sources and one for targets"
    assert "data.max_target_tokens = 30" in titles
    assert "href" not in (out / "lengths.svg").read_text()


def test_texts_alone_and_other_fields(prepare, tmp_path):
    alone = prepare("--train", write(tmp_path / "a.jsonl", [{"body": "one two"}, {"body": "three"}]), "--text", "body",
                    out="alone")
    assert pairs(alone / "train") == [("", "one two"), ("", "three")]
    facts = json.loads((alone / "statistics.json").read_text())["splits"]["train"]
    assert set(facts) == {"documents", "samples", "target"}
    other = prepare("--train", write(tmp_path / "b.jsonl", [{"body": "a b", "conclusion": "c", "text": "no"}]),
                    "--src", "body", "--trg", "conclusion", out="other")
    assert pairs(other / "train") == [("a b", "c")]


def test_vocabulary_is_trained_on_what_stays_in_train(prepare, tmp_path):
    documents = [*DOCUMENTS, *[{"src": "zyzzyva " * 30 + str(i), "trg": "zyzzyva"} for i in range(60)]]
    path = write(tmp_path / "all.jsonl", documents)
    whole = Vocabulary(prepare("--train", path, "--vocab_size", "345", out="a") / "vocabulary.model")
    without = Vocabulary(prepare("--train", write(tmp_path / "train.jsonl", DOCUMENTS), "--test", path,
                                 "--vocab_size", "345", "--duplicates", "keep", out="b") / "vocabulary.model")
    assert len(whole.encode(["zyzzyva"])[0]) < len(without.encode(["zyzzyva"])[0])


RECORDS = {
    "arxiv": ([{"article": "the article", "abstract": "the abstract", "section_names": "x"}],
              [("the article", "the abstract")]),
    "hotpotqa": ([{"id": "5a", "question": "Who built it?", "answer": "Ann", "type": "bridge", "level": "hard",
                   "supporting_facts": {"title": ["House"], "sent_id": [0]},
                   "context": {"title": ["House", "Ann"],
                               "sentences": [["It stands.", " Ann built it."], ["A person."]]}}],
                 [("Who built it?\n\nHouse\nIt stands. Ann built it.\n\nAnn\nA person.", "Ann")]),
    "conversation": ([{"post": ["how", "are", "you", "?"], "response": ["fine", "."], "match_index": [[-1, -1]]},
                      {"post": "hello there", "response": "hi", "match_index": [[-1, -1]]}],
                     [("how are you ?", "fine ."), ("hello there", "hi")]),
    "qqp": ([{"question1": "why ?", "question2": "what for ?", "label": 1, "idx": 0},
             {"question1": "why ?", "question2": "when ?", "label": 0, "idx": 1}], [("why ?", "what for ?")]),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_recipes_on_files_of_the_same_form(prepare, tmp_path, name, kind):
    given, documents = RECORDS[name]
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        write(path, given)
    else:
        given = [record for record in given if not isinstance(record.get("post"), str)]  # a column has one type
        pa.parquet.write_table(pa.Table.from_pylist(given), path)
    out = prepare("--recipe", name, "--train", str(path))
    assert pairs(out / "train") == documents[:len(given)]


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.hub])
def test_recipes_ask_the_hub_for_their_splits(prepare, name, monkeypatch, tmp_path):
    import datasets

    asked = []

    def load_dataset(hub, configuration, *, split, cache_dir, keep_in_memory):
        asked.append(f"{hub}:{configuration}:{split}")
        given = [record | {"src": "unused"} for record in RECORDS[name][0]]
        path = write(tmp_path / f"{split}.jsonl", given)
        return datasets.Dataset.from_json(path, cache_dir=str(tmp_path / split))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    out = prepare("--recipe", name, "--duplicates", "keep")
    assert set(asked) == set(RECIPES[name].hub.values())
    assert pairs(out / "train") == RECORDS[name][1]


def test_records_of_another_form_are_refused(prepare, tmp_path):
    path = write(tmp_path / "x.jsonl", [RECORDS["hotpotqa"][0][0], {"question": "q", "context": {}, "answer": "a"}])
    with pytest.raises(DataError, match=r"x\.jsonl:2: is not a record of hotpotqa, which has question, "):
        prepare("--recipe", "hotpotqa", "--train", path)
    assert not [path for path in tmp_path.glob("out*") if path.suffix != ".lock"], "nothing is left behind"


@pytest.mark.parametrize(("words", "message"), [
    ([], "--train: is missing: give files, folders, globs or a hub name"),
    (["--recipe", "conversation"], "--train: is missing: .* (conversation is not on the hub)"),
    (["--train", "T", "--valid", "T", "--valid_percent", "3"], "--valid_percent: and --valid exclude each other"),
    (["--train", "T", "--valid_percent", "60", "--test_percent", "40"], "--valid_percent: .* leave documents to train"),
    (["--train", "T", "--duplicates", "near", "--similarity", "1.5"], "--similarity: must lie between 0 and 1"),
    (["--train", "T", "--max_target_tokens", "0"], "data.max_target_tokens: must be positive, not 0"),
    (["--train", "T", "--workers", "-1"], "data.workers: must be 0"),
    (["--train", "none.jsonl"], "--train: none.jsonl: no such file or folder"),
])
def test_mistakes_get_one_line(prepare, tmp_path, words, message):
    path = write(tmp_path / "train.jsonl", DOCUMENTS[:5])
    with pytest.raises((ConfigError, DataError)) as caught:
        prepare(*[path if word == "T" else word for word in words])
    assert re.match(re.escape(message).replace(r"\.\*", ".*"), str(caught.value)), caught.value


def test_near_needs_its_package(prepare, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ConfigError, match=r"--duplicates: near needs .* pip install datasketch=="):
        prepare("--train", write(tmp_path / "train.jsonl", DOCUMENTS), "--duplicates", "near")


def test_folders_of_others_are_not_touched(prepare, tmp_path):
    path = write(tmp_path / "train.jsonl", DOCUMENTS)
    out = prepare("--train", path)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    with pytest.raises(ConfigError, match=r"--out: .* was not made from these documents with these options"):
        prepare("--train", path, "--duplicates", "keep")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match=r"--out: .*mine was not made from these documents"):
        prepare("--train", path, out="mine")
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("*")}


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
            and file.name not in ("data.toml", "selection.npz")}


@pytest.fixture
def in_pieces(monkeypatch):
    monkeypatch.setattr(records, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(token_cache, "_SHARD_TOKENS", 1500)


def test_result_does_not_depend_on_the_number_of_processes(prepare, tmp_path, in_pieces):
    words = ["--train", write(tmp_path / "all.jsonl", DOCUMENTS + DOCUMENTS[:9]), "--valid_percent", "20"]
    alone = prepare(*words)
    assert len(list((alone / "train").glob("*.tokens"))) > 2
    with local_workers(3) as workers:
        shared = prepare(*words, out="shared", workers=workers)
    assert content(shared) == content(alone)


@pytest.mark.parametrize("stage", ["selection", "vocabulary", "first shard", "statistics"])
def test_interrupted_at_any_stage_it_goes_on(prepare, tmp_path, in_pieces, monkeypatch, stage):
    from tools.preparing import folder

    words = ["--train", write(tmp_path / "all.jsonl", DOCUMENTS), "--test_percent", "30"]
    whole = prepare(*words, out="whole")
    place, name, turn = {"selection": (folder, "_select", 0), "vocabulary": (folder, "open_vocabulary", 1),
                         "first shard": (token_cache, "_write_shard", 1),
                         "statistics": (folder, "statistics", 0)}[stage]
    function, calls = getattr(place, name), []

    def interrupted(*args):
        calls.append(name)
        if len(calls) > turn:
            raise KeyboardInterrupt
        return function(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(place, name, interrupted)
        prepare(*words)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    assert content(prepare(*words)) == content(whole)


def command(*words):
    return [sys.executable, str(ROOT / "tools/prepare_data.py"), *words]


def test_help_and_exit_codes(tmp_path):
    shown = prepare_data.build_parser().format_help()
    assert "recipes:" in shown and "ccdv/arxiv-summarization:document:train" in shown
    wrong = subprocess.run(command("--train", "none.jsonl", "--out", "x"), capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 81
    assert wrong.stderr == "error: --train: none.jsonl: no such file or folder\n"


@pytest.mark.parametrize("words, message", [
    (["--trian", "x"], "error: command line: unrecognized arguments: --trian x (--help explains all of it)"),
    (["--workers", "-3"], "error: --workers: must be 0 (one for each core) or positive, not -3"),
])
def test_a_command_line_that_cannot_work_ends_with_80(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--train", "x", "--out", "y", *words])
    with pytest.raises(SystemExit) as ended:
        run(prepare_data.main)
    assert ended.value.code == 80 and capsys.readouterr().err == f"{message}\n"


@pytest.mark.slow
def test_killed_and_started_again_it_ends_the_same(tmp_path):
    write(tmp_path / "all.jsonl", [{"src": text(i, 2000), "trg": text(i, 9)} for i in range(700)])
    words = ["--train", "all.jsonl", "--vocab_size", "340", "--workers", "2"]
    subprocess.run(command(*words, "--out", "whole"), cwd=tmp_path, check=True, capture_output=True)
    for seconds in (1.5, 3.0, 4.5):
        process = subprocess.Popen(command(*words, "--out", "cut"), cwd=tmp_path, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL if seconds < 4 else signal.SIGINT)
        process.wait(30)
    subprocess.run(command(*words, "--out", "cut"), cwd=tmp_path, check=True, capture_output=True)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


@pytest.mark.slow
def test_ranks_of_mpi_share_the_work(tmp_path):
    if shutil.which("mpirun") is None or subprocess.run([sys.executable, "-c", "from mpi4py import MPI"],
                                                        capture_output=True).returncode:
        assert not os.environ.get("REQUIRE_MPI"), "mpirun and mpi4py are required here"
        pytest.skip("needs mpirun and mpi4py")
    write(tmp_path / "all.jsonl", [{"src": text(i, 2000), "trg": text(i, 9)} for i in range(300)])
    words = ["--train", "all.jsonl", "--vocab_size", "340", "--valid_percent", "10"]
    subprocess.run(command(*words, "--workers", "1", "--out", "alone"), cwd=tmp_path, check=True, capture_output=True)
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "3"]
    shared = subprocess.run([*mpirun, *command(*words, "--out", "shared")], cwd=tmp_path, capture_output=True,
                            text=True)
    assert shared.returncode == 0 and shared.stdout.count("left out:") == 1, shared.stderr
    assert content(tmp_path / "shared") == content(tmp_path / "alone")
    wrong = subprocess.run([*mpirun, *command("--train", "none.jsonl", "--out", "wrong")], cwd=tmp_path,
                           capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 81 and wrong.stderr.count("error: --train: none.jsonl: no such file or folder") == 1
