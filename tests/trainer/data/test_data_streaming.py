"""Reading in blocks, sharing the work among processes, and going on where a preparation was interrupted."""

import gzip
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from model.errors import ConfigError
from tests.trainer.data.conftest import local
from trainer.data import records, token_cache
from trainer.data.records import documents
from trainer.data.token_cache import TokenCache, open_token_cache
from trainer.data.vocabulary import train_vocabulary
from trainer.data.workers import ALONE, local_workers
from trainer.errors import DataError

TEXTS = [f"document {i} " + "with some words " * (i % 9) + chr(0xE0 + i % 20) for i in range(400)]
PAIRS = [(text, text[::-1] if i % 3 else "") for i, text in enumerate(TEXTS)]
RECORDS = [{"src": source, "trg": target, "more": [1]} for source, target in PAIRS]


@pytest.fixture
def files(tmp_path, write_jsonl, monkeypatch):
    """The same documents in every format, with blocks of a few of them."""
    monkeypatch.setattr(records, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(records, "_BATCH_ROWS", 3)
    plain = write_jsonl(RECORDS)
    zipped = tmp_path / "corpus.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    columns = tmp_path / "corpus.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(RECORDS), columns, row_group_size=37)
    return {"jsonl": plain, "gz": zipped, "parquet": columns}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return train_vocabulary(TEXTS, tmp_path_factory.mktemp("vocabulary") / "v.model", 310)


@pytest.mark.parametrize("kind", ["jsonl", "gz", "parquet"])
def test_blocks_hold_every_document_once_in_order(files, kind):
    corpus = local(files[kind])
    blocks = list(corpus.blocks())
    assert len(blocks) > 20
    assert [pair for block in blocks for pair in zip(*documents(block, corpus.reader), strict=True)] == PAIRS
    done = [block.done for block in blocks]
    assert done == sorted(done) and done[-1] == 1
    assert [block.first for block in blocks] == np.cumsum(
        [1, *(len(documents(block, corpus.reader)[0]) for block in blocks)])[:-1].tolist()


@pytest.mark.parametrize("kind", ["jsonl", "gz"])
@pytest.mark.parametrize("line", [1, 2, 97, 400])
def test_faults_behind_the_first_block_name_their_line(files, kind, line):
    lines = files["jsonl"].read_bytes().splitlines(keepends=True)
    lines[line - 1] = b'{"src": "a", "trg": 7}\n'
    content = b"".join(lines)
    files[kind].write_bytes(gzip.compress(content) if kind == "gz" else content)
    corpus = local(files[kind])
    with pytest.raises(DataError) as caught:
        for block in corpus.blocks():
            documents(block, corpus.reader)
    assert str(caught.value) == f'{files[kind]}:{line}: field "trg" must be a string, not a number'


def test_lines_longer_than_a_block_and_odd_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "BLOCK_BYTES", 10)
    path = tmp_path / "odd.jsonl"
    texts = ["x" * 500, "", "short", "y" * 30]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\n".join(json.dumps({"text": text}).encode() for text in texts))
    corpus = local(path)
    assert [text for block in corpus.blocks() for text in documents(block, corpus.reader)[1]] == texts


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(token_cache, "_SHARD_TOKENS", 2000)


def test_cache_is_the_same_whatever_the_number_of_processes(files, vocabulary, tmp_path, small_shards):
    corpus = local(files["jsonl"])
    alone = open_token_cache(corpus, vocabulary, tmp_path / "1")
    assert len(list(alone.folders[0].glob("*.tokens"))) > 3
    encoded = vocabulary.encode([text for pair in PAIRS for text in pair])
    assert [alone.source(i).tolist() for i in range(400)] == encoded[::2]
    assert [alone.target(i).tolist() for i in range(400)] == encoded[1::2]
    for count in (2, 3):
        with local_workers(count) as workers:
            shared = open_token_cache(corpus, vocabulary, tmp_path / str(count), workers=workers)
        assert bytes_of(shared.folders[0]) == bytes_of(alone.folders[0])


def test_several_caches_are_read_as_one(files, vocabulary, tmp_path, small_shards, write_jsonl):
    first = open_token_cache(local(files["jsonl"]), vocabulary, tmp_path)
    second = open_token_cache(local(write_jsonl([{"text": "alone"}], "other.jsonl")), vocabulary, tmp_path)
    both = TokenCache(second.folders[0], first.folders[0])
    assert both.bounds.tolist() == [0, 1, 401] and both.paired_N.tolist() == [False] + [True] * 400
    texts = vocabulary.decode([both.target(0), both.source(1), both.source(400)])
    assert texts == ["alone", PAIRS[0][0], PAIRS[399][0]]
    assert (both.source_lengths_N[1:] == first.source_lengths_N).all()


def test_caches_of_different_vocabularies_are_not_mixed(files, numbers, vocabulary, tmp_path, write_jsonl):
    first = open_token_cache(local(files["jsonl"]), vocabulary, tmp_path)
    other = open_token_cache(local(write_jsonl([{"text": "5"}], "other.jsonl")), numbers(), tmp_path)
    with pytest.raises(DataError, match="was tokenized with another vocabulary than"):
        TokenCache(first.folders[0], other.folders[0])


def _open_until(corpus, vocabulary, cache_dir, blocks, log, ready):
    """Opens a cache, writing down every block that is tokenized; waits for ever at block number `blocks`."""
    encode = token_cache.encode_block

    def counted(block, **more):
        with open(log, "a") as handle:
            handle.write(f"{block.first}\n")
        if len(log.read_text().split()) == blocks:
            ready.set()
            time.sleep(60)
        return encode(block, **more)

    token_cache.encode_block = counted
    open_token_cache(corpus, vocabulary, cache_dir)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_preparation_goes_on_after_its_last_shard(files, vocabulary, tmp_path, small_shards, ending):
    corpus, log = local(files["jsonl"]), tmp_path / "log"
    whole = open_token_cache(corpus, vocabulary, tmp_path / "whole").folders[0]
    context = multiprocessing.get_context("fork")
    for stop in (17, 35, 10_000):
        ready = context.Event()
        child = context.Process(target=_open_until, args=(corpus, vocabulary, tmp_path / "cut", stop, log, ready))
        child.start()
        if stop < 10_000:
            assert ready.wait(30)
            os.kill(child.pid, ending)
        child.join(30)
        assert child.exitcode == (0 if stop == 10_000 else -ending if ending == signal.SIGKILL else 1)
    assert bytes_of(tmp_path / "cut/tokens" / whole.name) == bytes_of(whole)
    tokenized = Counter(map(int, log.read_text().split()))
    blocks = [block.first for block in corpus.blocks()]
    assert set(tokenized) == set(blocks)
    twice = sum(count - 1 for count in tokenized.values())
    assert twice <= 2 * 10, "only the blocks of the shards in progress, of about ten blocks each, are done again"
    assert tokenized[blocks[0]] == 1


def test_shards_of_another_content_are_not_used(files, vocabulary, tmp_path, small_shards, monkeypatch):
    write = token_cache._write_shard

    def first_only(folder, number, parts):
        if number:
            raise KeyboardInterrupt
        return write(folder, number, parts)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(token_cache, "_write_shard", first_only)
        open_token_cache(local(files["jsonl"]), vocabulary, tmp_path / "cache")
    files["jsonl"].write_text("".join(json.dumps(record | {"trg": "new"}) + "\n" for record in RECORDS))
    cache = open_token_cache(local(files["jsonl"]), vocabulary, tmp_path / "cache")
    assert vocabulary.decode([cache.target(0)]) == ["new"]


def _die(item):
    os._exit(9)


def _fail(item):
    raise DataError(f"item {item} is bad")


def _identity(item, pause=0.0):
    time.sleep(pause * (item % 3))
    return item


def test_results_come_in_order_and_few_items_ahead():
    taken = []

    def items():
        for item in range(40):
            taken.append(item)
            yield item

    with local_workers(3) as workers:
        results = workers.map(partial(_identity, pause=0.002), items())
        first = [next(results), next(results)]
        assert len(taken) <= 10, "input must not pile up in memory"
        assert first + list(results) == list(range(40))
    assert list(ALONE.map(_identity, range(3))) == [0, 1, 2]


def test_errors_of_processes_reach_the_caller():
    with local_workers(2) as workers, pytest.raises(DataError, match="item 0 is bad"):
        list(workers.map(_fail, range(5)))
    with local_workers(2) as workers, pytest.raises(ConfigError, match=r"data\.workers: one of 2 processes died"):
        list(workers.map(_die, range(5)))



def _pid_then_sleep(item):
    time.sleep(0.2)
    return os.getpid()


def _start_and_hang(path):
    with local_workers(2) as workers:
        pids = set(workers.map(_pid_then_sleep, range(2)))
        path.write_text(" ".join(map(str, pids)))
        time.sleep(60)


def test_processes_end_with_a_killed_parent(tmp_path):
    parent = multiprocessing.get_context("fork").Process(target=_start_and_hang, args=(tmp_path / "pids",))
    parent.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = list(map(int, (tmp_path / "pids").read_text().split()))
    parent.kill()
    parent.join(30)
    while any(_alive(pid) for pid in children):
        assert time.monotonic() < deadline, "orphans are left"
        time.sleep(0.05)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
