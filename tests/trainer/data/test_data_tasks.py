"""Source dropout and infilling in training batches: rates, keys, layout, and the step's facts."""

import numpy as np
import pytest
import torch

from trainer.data.loader import PackedLoader
from trainer.data.packing import Samples
from trainer.data.tasks import gaps, step_tasks


@pytest.fixture
def samples(cache_of):
    random = np.random.default_rng(0)
    return Samples(cache_of([(random.integers(4, 99, random.integers(3, 30)).tolist(),
                              random.integers(4, 99, random.integers(0, 12)).tolist()) for _ in range(60)]),
                   max_source_tokens=24, max_target_tokens=8, row_tokens=60)


def test_tasks_have_their_rates_and_are_keyed_by_seed_step_and_sample(samples):
    chosen = list(range(60))
    tasks = [task for step in range(20) for task in step_tasks(samples, chosen, 0.25, 0.5, seed=3, step=step)]
    assert np.mean([task.without_source for task in tasks]) == pytest.approx(0.25, abs=0.04)
    assert np.mean([task.given is not None for task in tasks]) == pytest.approx(0.5, abs=0.05)
    both = np.mean([task.without_source and task.given is not None for task in tasks])
    assert both == pytest.approx(0.125, abs=0.03)

    def facts(tasks):
        return [(task.without_source, None if task.given is None else task.given.tolist()) for task in tasks]

    again = step_tasks(samples, chosen[30:], 0.25, 0.5, seed=3, step=7)
    assert facts(again) == facts(tasks[7 * 60 + 30:8 * 60])
    assert facts(step_tasks(samples, chosen[30:], 0.25, 0.5, seed=4, step=7)) != facts(again)


def test_gaps_leave_something_to_do_and_cover_two_fifths():
    generator = torch.Generator().manual_seed(0)
    assert gaps(1, generator).tolist() == [True]
    for tokens in (2, 3, 7):
        assert all(gaps(tokens, generator).any() for _ in range(50))
    drawn = [gaps(60, generator) for _ in range(600)]
    runs = [int((np.diff(np.concatenate([[0], each])) == 1).sum()) for each in drawn]
    assert set(runs) == {1, 2, 3}
    assert np.mean(drawn) == pytest.approx(0.4, abs=0.03)
    assert np.mean(drawn, axis=0).max() < 0.6  # everywhere in the text


@pytest.mark.parametrize("source_dropout, infilling", [(0.4, 0.0), (0.0, 0.5), (0.4, 0.5)])
def test_batches_do_as_their_tasks_say(samples, source_dropout, infilling):
    settings = {"rows_per_micro_batch": 3, "seed": 5, "source_dropout": source_dropout, "infilling": infilling}
    plain = PackedLoader(samples, rows_per_micro_batch=3, accumulation=2, seed=5)
    ranks = [PackedLoader(samples, world=2, rank=rank, **settings) for rank in range(2)]
    for step in (0, 4):
        (info, (first,)), (other, (second,)) = (rank.step(step) for rank in ranks)
        parts = first, second
        assert info == other
        assert info.tokens == sum(len(part) for part in parts)
        assert info.loss_tokens == sum(int(part.in_loss_T.sum()) for part in parts)
        assert info.source_tokens == sum(int((~part.is_target_T & ~part.is_given_T).sum()) for part in parts)
        seen = {"emptied": 0, "given": 0}
        for batch, whole in zip(parts, plain.step(step)[1], strict=True):
            assert torch.equal(batch.stratum_C, whole.stratum_C) and torch.equal(batch.sample_C, whole.sample_C)
            for document in range(batch.documents):
                mine, full = batch.document_T == document, whole.document_T == document
                source = batch.tokens_T[mine & ~batch.is_target_T & ~batch.is_given_T].tolist()
                was = whole.tokens_T[full & ~whole.is_target_T].tolist()
                assert source in (was, [1, 2])
                seen["emptied"] += source != was
                canvas = batch.tokens_T[mine & (batch.is_target_T | batch.is_given_T)].tolist()
                target = whole.tokens_T[full & whole.is_target_T].tolist()
                given = batch.is_given_T[mine][len(source):].tolist()
                if canvas != target:  # the end is given, and the filler behind it is left out
                    assert canvas == target[:len(canvas)] and canvas[-1] == 2 and given[-1]
                seen["given"] += any(given)
                trained = batch.in_loss_T[mine][len(source):].tolist()
                assert trained == [not g and token != 3 for g, token in zip(given, canvas, strict=True)]
                assert batch.position_T[mine].tolist() == list(range(len(source) + len(canvas)))
        assert (seen["emptied"] > 0) == (source_dropout > 0) and (seen["given"] > 0) == (infilling > 0)
