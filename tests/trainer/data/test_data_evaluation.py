import numpy as np
import pytest

from model.packing import generation_batch
from trainer.data.evaluation import evaluation_batches, evaluation_samples
from trainer.data.packing import Samples
from trainer.errors import DataError


@pytest.fixture
def samples(cache_of):
    """Document i: source [100 + i] * (i % 5 + 1), target [200 + i]."""
    return Samples(cache_of([([100 + i] * (i % 5 + 1), [200 + i]) for i in range(11)]), max_source_tokens=0,
                   max_target_tokens=3, row_tokens=26, draws=2)


def pairs(batch):
    """(sample, first source token, first target token) of each document."""
    out = []
    for document in range(batch.documents):
        tokens = batch.tokens_T[batch.document_T == document]
        target = batch.is_target_T[batch.document_T == document]
        out.append((int(batch.sample_C[2 * document]), int(tokens[1]), int(tokens[target][0])))
    return out


def passed(samples, world, **more):
    """Documents of weight 1 of all ranks, batch by batch, and the number of batches of each rank."""
    ranks = [list(evaluation_batches(samples, rank=rank, world=world, **more)) for rank in range(world)]
    rounds = [batch for turn in zip(*ranks, strict=True) for batch in turn]
    return [pairs(batch) for batch, weight in rounds if weight], {len(rank) for rank in ranks}


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [0, 1, 7])
def test_one_pass_in_order_with_as_many_batches_on_every_rank(samples, world, limit):
    batches, counts = passed(samples, world, limit=limit)
    assert batches == passed(samples, 1, limit=limit)[0]
    assert len(counts) == 1 and counts.pop() == -(-len(batches) // world)
    wanted = evaluation_samples(11, limit).tolist()
    assert [d for batch in batches for d in batch] == [(i, 100 + i, 200 + i) for i in wanted]


def test_idle_ranks_repeat_with_weight_zero(samples):
    ranks = [list(evaluation_batches(samples, rank=rank, world=5, indices=[3, 1])) for rank in range(5)]
    assert [rank[0].weight for rank in ranks] == [1, 0, 0, 0, 0]
    assert all(len(rank) == 1 and pairs(rank[0].batch) == [(3, 103, 203), (1, 101, 201)] for rank in ranks)


def test_batches_are_full_but_not_over_full(samples):
    batches = [batch for batch, _ in evaluation_batches(samples)]
    assert all(len(batch) <= 26 for batch in batches)
    sizes = [int((batch.document_T == 0).sum()) for batch in batches]
    assert all(len(batch) + size > 26 for batch, size in zip(batches, sizes[1:], strict=False))


def test_strata_count_all_copies_of_the_pass(samples):
    batches = [batch for batch, _ in evaluation_batches(samples, limit=7)]
    strata = [tuple(row) for batch in batches for row in batch.stratum_C.reshape(-1, 2).tolist()]
    assert strata == [(i, 7 + i) for i in range(7)]
    assert {batch.strata for batch in batches} == {14}


def test_shuffled_sources_never_meet_their_target(samples):
    batches, _ = passed(samples, 2, shuffle_sources=True)
    found = [d for batch in batches for d in batch]
    assert [(sample, target) for sample, _, target in found] == [(i, 200 + i) for i in range(11)]
    assert [source - 100 for _, source, _ in found] == [*range(1, 11), 0]
    (batch, _), *_ = evaluation_batches(samples, shuffle_sources=True)
    first = batch.document_T == 0
    assert batch.position_T[first].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6], "behind the source it was given"


@pytest.mark.parametrize("documents", [[([5], [6])], [[5, 6], [7]]])
def test_sources_that_cannot_be_exchanged(cache_of, documents):
    samples = Samples(cache_of(documents), max_source_tokens=0, max_target_tokens=3, row_tokens=26)
    with pytest.raises(DataError, match="two or more documents that have one"):
        next(evaluation_batches(samples, shuffle_sources=True))


@pytest.mark.parametrize(("count", "limit", "chosen"), [(10, 0, list(range(10))), (10, 3, [0, 3, 6]), (3, 9, [0, 1, 2]),
                                                        (10, 1, [0])])
def test_evaluation_samples_are_spread(count, limit, chosen):
    assert evaluation_samples(count, limit).tolist() == chosen


def test_generation_batch():
    batch = generation_batch([np.array([1, 5, 2]), np.array([], np.int64)], canvas_tokens=2, pad_id=3, candidates=2,
                             samples=[7, 9])
    assert batch.tokens_T.tolist() == [1, 5, 2, 3, 3, 3, 3, 3, 3, 3, 3]
    assert batch.is_target_T.tolist() == [False] * 3 + [True] * 8
    assert batch.position_T.tolist() == [0, 1, 2, 3, 4, 3, 4, 0, 1, 0, 1]
    assert batch.draw_T.tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1]
    assert not batch.in_loss_T.any()
    assert batch.sample_C.tolist() == [7, 7, 9, 9] and batch.draw_C.tolist() == [0, 1, 0, 1]
    assert (batch.documents, batch.rows, batch.strata) == (2, 1, 4)


def test_generation_sees_what_training_saw_of_a_document(samples):
    batch = generation_batch([samples.source(4)], canvas_tokens=3, pad_id=3, candidates=2, samples=[4])
    (trained, _), = evaluation_batches(samples, indices=[4])
    given = ~trained.is_target_T
    assert (batch.tokens_T[given] == trained.tokens_T[given]).all()
    assert (batch.position_T == trained.position_T).all() and (batch.is_target_T == trained.is_target_T).all()
