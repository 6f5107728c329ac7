import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from tests.trainer.data.conftest import local
from trainer.data import token_cache
from trainer.data.corpus import Corpus
from trainer.data.token_cache import open_token_cache
from trainer.errors import DataError

DOCUMENTS = [([5, 6], [7]), ([], [8, 9, 10]), ([11], [])]


@pytest.fixture
def corpus(tmp_path, write_jsonl):
    path = write_jsonl([{"src": " ".join(map(str, source)), "trg": " ".join(map(str, target))}
                        for source, target in DOCUMENTS])
    return local(path)


def contents(cache):
    return [(cache.source(i).tolist(), cache.target(i).tolist()) for i in range(len(cache))]


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache/tokens").iterdir() if path.is_dir())


@pytest.mark.parametrize(("size", "kind"), [(1000, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_holds_every_token(tmp_path, corpus, numbers, size, kind):
    cache = open_token_cache(corpus, numbers(size), tmp_path / "cache")
    assert contents(cache) == DOCUMENTS
    assert cache.source(0).dtype == kind
    assert cache.paired_N.all() and cache.bounds.tolist() == [0, 3]
    assert cache.source_lengths_N.tolist() == [2, 0, 1] and cache.target_lengths_N.tolist() == [1, 3, 0]
    assert cache.target(1, 1, 9).tolist() == [9, 10] and cache.target(1, 0, 2).tolist() == [8, 9]
    assert (cache.bos_id, cache.eos_id, cache.pad_id, cache.vocab_size) == (1, 2, 3, size)


def test_many_documents_and_texts(cache_of):
    documents = [list(range(4, 4 + i % 7)) for i in range(700)]  # several batches
    cache = cache_of(documents)
    assert not cache.paired_N.any() and contents(cache) == [([], document) for document in documents]


def test_second_time_reads_no_document(tmp_path, corpus, numbers, monkeypatch):
    open_token_cache(corpus, numbers(), tmp_path / "cache")
    monkeypatch.setattr(Corpus, "blocks", None)
    assert contents(open_token_cache(local(corpus.files[0]), numbers(), tmp_path / "cache")) == DOCUMENTS


def test_another_vocabulary_or_content_is_another_cache(tmp_path, corpus, numbers):
    open_token_cache(corpus, numbers(), tmp_path / "cache")
    open_token_cache(corpus, numbers(2000), tmp_path / "cache")
    corpus.files[0].write_text('{"src": "1", "trg": "2"}\n')
    changed = local(corpus.files[0])
    assert contents(open_token_cache(changed, numbers(), tmp_path / "cache")) == [([1], [2])]
    assert len(folders(tmp_path)) == 3


def test_failed_build_leaves_nothing(tmp_path, corpus, numbers):
    broken = numbers()
    def fail(texts):
        raise DataError("bad")

    broken.encode_arrays = fail
    with pytest.raises(DataError, match="bad"):
        open_token_cache(corpus, broken, tmp_path / "cache")
    assert folders(tmp_path) == []


@pytest.mark.parametrize("damage", ["00000.tokens", "00000.lengths.npy", "manifest.json"])
def test_damaged_cache_is_built_again(tmp_path, corpus, numbers, damage):
    cache = open_token_cache(corpus, numbers(), tmp_path / "cache")
    path = cache.folders[0] / damage
    path.write_bytes(path.read_bytes()[:-1])
    assert contents(open_token_cache(corpus, numbers(), tmp_path / "cache")) == DOCUMENTS
    assert folders(tmp_path) == [cache.folders[0].name]


def test_faulty_corpus(tmp_path, numbers, write_jsonl):
    path = write_jsonl([{"src": "1", "trg": "2"}, {"src": "1"}])
    corpus = local(path)
    with pytest.raises(DataError, match=r"corpus\.jsonl:2: needs fields"):
        open_token_cache(corpus, numbers(), tmp_path / "cache")


def _open_slowly(corpus, vocabulary, cache_dir, started, log):
    encode = vocabulary.encode_arrays

    def slow(texts):
        started.set()
        with open(log, "a") as handle:
            handle.write(f"{os.getpid()}\n")
        time.sleep(0.4)
        return encode(texts)

    vocabulary.encode_arrays = slow
    assert contents(open_token_cache(corpus, vocabulary, cache_dir)) == DOCUMENTS


@pytest.fixture
def process(tmp_path, corpus, numbers):
    """Starts a process that opens the cache, slowly if it has to build it."""
    context = multiprocessing.get_context("fork")
    running = []

    def start():
        started = context.Event()
        arguments = (corpus, numbers(), tmp_path / "cache", started, tmp_path / "log")
        running.append(context.Process(target=_open_slowly, args=arguments))
        running[-1].start()
        return running[-1], started

    yield start
    for child in running:
        child.kill()


def test_one_of_several_processes_builds(tmp_path, process):
    children = [process()[0] for _ in range(3)]
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 0]
    builders = (tmp_path / "log").read_text().split()
    assert len(builders) == 1, "one process, for one batch of texts"


def test_killed_build_is_gone_on_with(tmp_path, process, corpus, numbers):
    child, started = process()
    assert started.wait(30)
    child.kill()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    (left,) = folders(tmp_path)
    assert left.endswith(".partial")
    cache = open_token_cache(corpus, numbers(), tmp_path / "cache")
    assert contents(cache) == DOCUMENTS and folders(tmp_path) == [cache.folders[0].name]


def test_without_locks_it_is_built_twice_harmlessly(tmp_path, process, corpus, numbers, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError("no locks here")))
    children = [process()[0] for _ in range(2)]
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0]
    assert len(set((tmp_path / "log").read_text().split())) == 2
    monkeypatch.setattr(token_cache, "write_token_cache", None)
    assert contents(open_token_cache(corpus, numbers(), tmp_path / "cache")) == DOCUMENTS
    assert len(folders(tmp_path)) == 1
