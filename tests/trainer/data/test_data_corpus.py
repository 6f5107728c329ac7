import collections
import gzip
import json
import os
import socket

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from trainer.data.config import CorpusConfig
from trainer.data.corpus import REPOSITORY, find_corpus
from trainer.data.records import documents, texts
from trainer.errors import DataError

GOOD = '{"src": "a", "trg": "b"}\n'
NAME_THEM = ". Name its fields by data.source_field and data.target_field, or data.text_field"
PAIRS = [("one\ntwo", "1"), ("", "zwei ü"), ("three", "")]


@pytest.fixture
def corpus(tmp_path):
    def find(where, split="train", **fields):
        fields = {"source_field": "src", "target_field": "trg", "text_field": "text"} | fields
        return find_corpus(CorpusConfig(documents=where, **fields), split, tmp_path / "cache")
    return find


def read(corpus):
    return [pair for block in corpus.blocks() for pair in zip(*documents(block, corpus.reader), strict=True)]


@pytest.fixture
def folder(tmp_path):
    """The same three documents as JSON lines, gzip, Parquet and a JSON list."""
    records = [{"id": i, "src": source, "trg": target} for i, (source, target) in enumerate(PAIRS)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(records))
    pa.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.json", "d.parquet"])
def test_reads_every_format_without_network(folder, corpus, name, monkeypatch):
    def refuse(*_):
        raise AssertionError("a local file needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    found = corpus(str(folder / name))
    assert found.reader.paired
    assert read(found) == PAIRS
    assert list(texts(found.blocks(), found.reader)) == ["one\ntwo", "1", "zwei ü", "three"]


def test_lists_globs_and_folders(folder, corpus):
    (folder / "d.parquet").rename(folder / "d.other")
    assert read(corpus([str(folder / "a.jsonl"), str(folder / "c.json")])) == PAIRS * 2
    assert read(corpus(str(folder / "[ab].json*"))) == PAIRS * 2
    assert read(corpus(str(folder))) == PAIRS * 3


def test_text_corpora_and_other_fields(corpus, write_jsonl):
    texts = corpus(str(write_jsonl([{"text": "x"}, {"text": "y", "extra": 1}])))
    assert not texts.reader.paired and read(texts) == [("", "x"), ("", "y")]
    records = [{"question": "q", "answer": "a", "id": 1}, {"question": "r", "answer": "b", "id": "x"}]
    named = corpus(str(write_jsonl(records, "named.jsonl")), source_field="question", target_field="answer")
    assert read(named) == [("q", "a"), ("r", "b")]


def test_bundled_corpus_is_found_from_anywhere(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(read(corpus("data/proposals/valid.jsonl.gz"))) == 133


def test_changed_file_is_read_again(corpus, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(GOOD)
    first = corpus(str(path))
    assert read(first) == [("a", "b")] and first.digest
    times = path.stat()
    path.write_text(GOOD.replace('"b"', '"c"'))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = corpus(str(path))
    assert again.digest != first.digest and read(again) == [("a", "c")]


def test_digest_depends_on_content_alone(folder, corpus):
    copy = folder / "copy.jsonl"
    copy.write_bytes((folder / "a.jsonl").read_bytes())
    assert corpus(str(copy)).digest == corpus(str(folder / "a.jsonl")).digest
    assert corpus(str(copy), text_field="other").digest != corpus(str(copy)).digest


@pytest.mark.parametrize(("content", "message"), [
    (GOOD + '{"src": "a", "trg":\n', "{}:2: is not valid JSON: Expecting value (column 20)"),
    (GOOD + '\n{"src": "a"}\n', '{}:3: needs fields "src" and "trg", or "text"; it has src' + NAME_THEM),
    (GOOD + '{"src": "a", "trg": 3}\n', '{}:2: field "trg" must be a string, not a number'),
    (GOOD * 3 + '{"src": null, "trg": "b"}\n', '{}:4: field "src" must be a string, not null'),
    ('{"src": ["a"], "trg": "b"}\n', '{}:1: field "src" must be a string, not a list'),
    ('{"x": 1}\n', '{}:1: needs fields "src" and "trg", or "text"; it has x' + NAME_THEM),
    (GOOD + '"text"\n', "{}:2: must be a JSON object, not a string"),
    ('{"src": "a", "trg": "\\ud800"}\n', '{}:1: has half of a surrogate pair in its text'),
    ('[{"src": "a", "trg": "b"},\n {"src": "a", "trg": 1}]',
     '{}: record 2: field "trg" must be a string, not a number'),
    ('[{"src": "a", "trg": "b"},\n {"src": "a" "trg"}]',
     "{}:2: is not valid JSON: Expecting ',' delimiter (column 14)"),
    ('[1]', "{}: record 1: must be a JSON object, not a number"),
    (GOOD.encode() + b'{"src": "a", "trg": "\xff"}\n', "{}:2: is not UTF-8"),
    ("\n \n", "{}: is empty"),
    ("", "{}: is empty"),
])
@pytest.mark.parametrize("compressed", [False, True])
def test_faults_name_file_and_line(corpus, tmp_path, content, message, compressed):
    content = content if isinstance(content, bytes) else content.encode()
    path = tmp_path / ("bad.jsonl.gz" if compressed else "bad.jsonl")
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(DataError) as caught:
        read(corpus(str(path)))
    assert str(caught.value) == message.format(path)


def test_fault_in_a_later_file_and_far_down(corpus, tmp_path):
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "b.jsonl").write_text(GOOD * 99_999 + '{"src": "a", "trg": 1}\n')
    with pytest.raises(DataError, match=r'b\.jsonl:100000: field "trg" must be a string, not a number$'):
        read(corpus(str(tmp_path / "*.jsonl")))


def test_damaged_gzip(corpus, tmp_path):
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD.encode() * 1000)[:-20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: is damaged: "):
        read(corpus(str(path)))


@pytest.mark.parametrize(("column", "found"), [([1, 2], "record 1: field \"trg\" must be a string, not a number"),
                                               (["a", None], "record 2: field \"trg\" must be a string, not null")])
def test_faulty_parquet(corpus, tmp_path, column, found):
    pa.parquet.write_table(pa.table({"src": ["a", "b"], "trg": column}), tmp_path / "x.parquet")
    with pytest.raises(DataError) as caught:
        read(corpus(str(tmp_path / "x.parquet")))
    assert str(caught.value) == f'{tmp_path / "x.parquet"}: {found}'


@pytest.mark.parametrize(("where", "message"), [
    ("/no/such.jsonl", "data.valid: /no/such.jsonl: no such file or folder"),
    ("nothing.json", "data.valid: nothing.json: no such file or folder"),
    ("no such thing", "data.valid: no such thing: no such file or folder"),
    ("none-*.jsonl", "data.valid: none-*.jsonl has no files (.jsonl, .json, .jsonl.gz, .json.gz, .parquet)"),
    (["owner/name"], "data.valid: owner/name does not exist; a list holds files, folders and globs only"),
])
def test_nothing_there(corpus, where, message):
    with pytest.raises(DataError) as caught:
        corpus(where, "valid")
    assert str(caught.value) == message


def test_mixed_formats(corpus, folder):
    assert read(corpus(str(folder))) == PAIRS * 4


@pytest.mark.parametrize(("where", "split", "asked"), [
    ("owner/name", "valid", ("owner/name", None, "validation")),
    ("name:part", "train", ("name", None, "part")),
    ("owner/name:3.0.0:test", "train", ("owner/name", "3.0.0", "test")),
])
def test_hub_names(corpus, monkeypatch, where, split, asked):
    def load(name, configuration, *, split, cache_dir, keep_in_memory):
        assert (name, configuration, split) == asked
        assert cache_dir.endswith("cache/datasets") and not keep_in_memory
        return datasets.Dataset.from_dict({"src": ["a"], "trg": ["b"], "more": [1]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read(corpus(where, split)) == [("a", "b")]


def test_hub_digest_depends_on_content(corpus, tmp_path, write_jsonl, monkeypatch):
    def digest(target):
        path = write_jsonl([{"src": "a", "trg": target}])
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_json(
            str(path), cache_dir=str(tmp_path / target)))
        return corpus("owner/name").digest

    assert len({digest("b"), digest("c")}) == 2


def test_unreachable_hub_is_one_line(corpus, monkeypatch):
    def load(*_, **__):
        raise ConnectionError("Couldn't reach it\nwith details")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError) as caught:
        read(corpus("owner/name"))
    assert str(caught.value) == ("owner/name: cannot be loaded: Couldn't reach it (nor is there a local file "
                                 "or folder of this name)")


def test_bundled_licences_and_size():
    folder = REPOSITORY / "data/proposals"
    licences, ids = collections.Counter(), []
    for split in ("train", "valid", "test"):
        with gzip.open(folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        licences.update(record["licence"] for record in records)
        ids += [record["id"] for record in records]
    assert set(licences) == {"CC0-1.0", "public domain or CC0-1.0", "Apache-2.0", "MIT OR Apache-2.0"}
    assert len(ids) == len(set(ids)) == 1604, "no document twice, in one split or in two"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 6_000_000
