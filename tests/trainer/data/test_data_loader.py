import threading
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.data.loader import PackedLoader
from trainer.data.packing import Samples

PER_TOKEN = ("tokens_T", "position_T", "is_target_T", "draw_T", "in_loss_T")


@pytest.fixture
def samples(cache_of):
    """53 documents; document i is told by its first source token, 100 + i."""
    random = np.random.default_rng(0)
    return Samples(cache_of([([100 + i, *random.integers(4, 99, random.integers(0, 30)).tolist()],
                              random.integers(4, 99, random.integers(0, 12)).tolist()) for i in range(53)]),
                   max_source_tokens=24, max_target_tokens=8, row_tokens=60, draws=2)


def loaders(samples, world, micro, accumulation, **more):
    return [PackedLoader(samples, rows_per_micro_batch=micro, accumulation=accumulation, rank=rank, world=world,
                         **more) for rank in range(world)]


def documents_of(batch):
    """What the batch says of each of its documents, without the batch's own numbering."""
    out = []
    for document in range(batch.documents):
        mine = batch.document_T == document
        copies = batch.copy_T[mine].unique()
        out.append((int(batch.sample_C[copies[0]]),
                    *(tuple(getattr(batch, name)[mine].tolist()) for name in PER_TOKEN),
                    tuple(batch.draw_C[copies].tolist()), tuple(batch.stratum_C[copies].tolist())))
    return out


def global_batch(ranks, step):
    """Sorted documents of all ranks, and their step's facts, which must agree."""
    results = [loader.step(step) for loader in ranks]
    assert len({info for info, _ in results}) == 1
    return results[0][0], sorted(d for _, batches in results for batch in batches for d in documents_of(batch))


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 12, 1), (1, 1, 12), (12, 1, 1), (2, 3, 2),
                                                              (3, 2, 2), (4, 3, 1), (2, 2, 3), (6, 2, 1)])
def test_global_batch_does_not_depend_on_its_division(samples, world, micro, accumulation):
    whole, divided = loaders(samples, 1, 12, 1, seed=4), loaders(samples, world, micro, accumulation, seed=4)
    for step in (0, 1, 5, 30):
        assert global_batch(divided, step) == global_batch(whole, step)


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 1, 1), (2, 1, 1), (3, 1, 2)])
def test_epochs_cover_every_document_exactly(samples, world, micro, accumulation):
    ranks = loaders(samples, world, micro, accumulation, seed=1)
    rows = ranks[0].rows
    done = rows.locate(0)[2] + rows.locate(rows.locate(0)[2])[2]  # rows of two epochs
    found, step = Counter(), 0
    while (step + 1) * ranks[0].rows_per_step <= done:
        found.update(document[0] for document in global_batch(ranks, step)[1])
        step += 1
    for row in range(step * ranks[0].rows_per_step, done):  # those of a step that reaches into the third
        found.update(rows[row].tolist())
    assert found == Counter([*range(53)] * 2)


def test_interrupted_epochs_hold_every_document_exactly_twice(samples):
    """Starts of 1 to 4 ranks, each from where the one before was saved, some with another global batch; a killed one
    has worked ahead."""
    starts = [(2, 1, 2, 3), (4, 1, 1, 2), (1, 2, 2, 0), (3, 1, 1, 2), (2, 2, 1, 1), (1, 1, 1, 99)]
    step, row, found = 0, 0, Counter()
    rows = PackedLoader(samples, rows_per_micro_batch=1, seed=6).rows
    end = sum(rows.locate(first)[2] for first in (0, rows.locate(0)[2]))  # of two epochs
    for world, micro, accumulation, steps in starts:
        ranks = loaders(samples, world, micro, accumulation, seed=6)
        for loader in ranks:
            loader.resume(step, row)
        streams = [loader.stream(step) for loader in ranks]
        for results in zip(*streams, strict=True):
            if not steps or row == end:
                break
            found.update(document[0] for _, batches in results for batch in batches for document in documents_of(batch))
            step, steps = step + 1, steps - 1
            row = ranks[0].first_row(step)
        for stream in streams:
            stream.close()
    assert row == end and step > 20
    assert found == Counter([*range(53)] * 2)


def test_restart_at_any_step_is_exact(samples):
    ran = PackedLoader(samples, rows_per_micro_batch=2, accumulation=2, rank=1, world=2, seed=8)
    steps = [ran.step(step) for step in range(12)]
    for start in (0, 3, 11):
        fresh = PackedLoader(samples, rows_per_micro_batch=2, accumulation=2, rank=1, world=2, seed=8)
        for (info, batches), (want_info, want) in zip(fresh.stream(start), steps[start:], strict=False):
            assert info == want_info
            assert all(equal(a, b) for a, b in zip(batches, want, strict=True))


def equal(a, b):
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y
               for x, y in ((getattr(a, f.name), getattr(b, f.name)) for f in fields(a)))


def test_seeds_differ(samples):
    a, b = (global_batch(loaders(samples, 1, 4, 1, seed=seed), 0)[1] for seed in (0, 1))
    assert [d[0] for d in a] != [d[0] for d in b]


@pytest.mark.parametrize("step", [0, 7])
def test_step_facts_are_those_of_the_batches(samples, step):
    ranks = loaders(samples, 2, 3, 2)
    info = ranks[0].step(step)[0]
    batches = [batch for loader in ranks for batch in loader.step(step)[1]]
    assert len(batches) == 4 and all(batch.rows == 3 for batch in batches)
    assert info.step == step and info.rows == 12
    assert info.tokens == sum(map(len, batches))
    assert info.loss_tokens == sum(int(batch.in_loss_T.sum()) for batch in batches)
    assert info.source_tokens == sum(int((~batch.is_target_T).sum()) for batch in batches)
    assert info.target_tokens == sum(int(batch.is_target_T.sum()) for batch in batches)
    assert info.documents == sum(batch.documents for batch in batches)
    assert info.copies == sum(len(batch.sample_C) for batch in batches) == batches[0].strata
    assert info.fill == info.tokens / (12 * 60)
    assert all(batch.row_T.bincount(minlength=3).max() <= 60 for batch in batches)


def test_epoch_of_a_step(samples):
    loader = PackedLoader(samples, rows_per_micro_batch=1)
    rows = loader.rows.locate(0)[2]
    assert loader.step(0)[0].epoch == 0
    assert loader.step(rows // 2)[0].epoch == rows // 2 / rows
    assert loader.step(rows)[0].epoch == 1


def test_strata_are_a_permutation_in_which_draws_are_spread(samples):
    info, documents = global_batch(loaders(samples, 2, 3, 2), 3)
    strata = [stratum for document in documents for stratum in document[-1]]
    assert sorted(strata) == list(range(info.copies))
    for document in documents:
        assert [stratum // info.documents for stratum in document[-1]] == [0, 1]
    _, (batch,) = loaders(samples, 1, 12, 1)[0].step(3)
    firsts = batch.stratum_C[::2].tolist()
    assert firsts != sorted(firsts), "rows, and so ranks, must not stand for noise levels"
    assert [d[-1] for d in global_batch(loaders(samples, 2, 3, 2), 4)[1]] != [d[-1] for d in documents]


def test_documents_are_those_of_the_corpus(samples):
    _, documents = global_batch(loaders(samples, 1, 8, 1), 2)
    for sample, tokens, *_ in documents:
        assert tokens[:2] == (samples.cache.bos_id, 100 + sample)


def test_step_longer_than_an_epoch(cache_of):
    samples = Samples(cache_of([([5], [6]), ([7], [8])]), max_source_tokens=0, max_target_tokens=2, row_tokens=10)
    info, (batch,) = PackedLoader(samples, rows_per_micro_batch=5).step(1)
    assert Counter(batch.sample_C.tolist()) == {0: 5, 1: 5} and info.documents == 10 and info.epoch == 5


def test_stream_reports_errors_and_ends_its_thread(samples, monkeypatch):
    loader = PackedLoader(samples, rows_per_micro_batch=2)
    step = loader.step

    def failing(number):
        if number == 2:
            raise RuntimeError("no more")
        return step(number)

    monkeypatch.setattr(loader, "step", failing)
    stream = loader.stream()
    assert [next(stream)[0].step, next(stream)[0].step] == [0, 1]
    with pytest.raises(RuntimeError, match="no more"):
        next(stream)
    another = loader.stream(5)
    next(another)
    another.close()
    assert "data loader" not in {thread.name for thread in threading.enumerate()}


def test_batches_are_finished_in_the_thread(samples):
    loader = PackedLoader(samples, rows_per_micro_batch=2, accumulation=2)
    stream = loader.stream(3, lambda step, batch: (step, threading.current_thread().name, batch))
    info, finished = next(stream)
    stream.close()
    assert info.step == 3 and [made[:2] for made in finished] == [(3, "data loader")] * 2
    assert all(equal(batch, want) for (*_, batch), want in zip(finished, loader.step(3)[1], strict=True))


def test_stream_works_ahead(samples, monkeypatch):
    loader = PackedLoader(samples, rows_per_micro_batch=2, prefetch=3)
    step, made, enough = loader.step, [], threading.Event()

    def counted(number):
        made.append(number)
        if number == 4:  # one in use, three waiting, one in hand
            enough.set()
        return step(number)

    monkeypatch.setattr(loader, "step", counted)
    stream = loader.stream()
    next(stream)
    assert enough.wait(20)
    stream.close()
    assert max(made) == 4
