from collections import Counter

import numpy as np
import pytest

from trainer.data.mixture import Mixture, Part
from trainer.data.packing import Samples
from trainer.data.token_cache import TokenCache


def mixture(*sizes_and_weights, seed=0):
    parts, low = [], 0
    for number, (size, weight) in enumerate(sizes_and_weights):
        parts.append(Part(f"part{number}", low, low + size, weight))
        low += size
    return Mixture(parts, seed)


@pytest.mark.parametrize("weight", [1, 2, 0.25, 0.1, 1.5, 2.7, 0.001])
@pytest.mark.parametrize("size", [1, 7, 40])
def test_no_document_comes_again_before_all_others_came(weight, size):
    mixed = mixture((5, 1), (size, weight))
    seen = Counter(dict.fromkeys(range(size + 5), 0))
    for epoch in range(30):
        chosen = mixed.epoch(epoch)
        assert len(chosen) == 5 + max(1, round(weight * size))
        seen.update(chosen.tolist())
        assert {seen[sample] for sample in range(5)} == {epoch + 1}
        counts = [seen[sample] for sample in range(5, 5 + size)]
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == (epoch + 1) * max(1, round(weight * size))


def test_epochs_are_known_without_those_before():
    walked = [mixture((9, 0.4), (20, 1.7), seed=3).epoch(epoch).tolist() for epoch in range(12)]
    assert mixture((9, 0.4), (20, 1.7), seed=3).epoch(11).tolist() == walked[11]
    assert len({tuple(epoch) for epoch in walked}) == 12
    assert mixture((9, 0.4), (20, 1.7), seed=4).epoch(0).tolist() != walked[0]


def test_a_share_of_a_corpus_is_another_one_each_epoch_and_each_pass():
    mixed = mixture((100, 0.1))
    epochs = [frozenset(mixed.epoch(epoch).tolist()) for epoch in range(20)]
    assert frozenset().union(*epochs[:10]) == frozenset().union(*epochs[10:]) == frozenset(range(100))
    assert set(epochs[:10]).isdisjoint(epochs[10:]), "the second pass is shuffled anew"
    assert any(max(epoch) - min(epoch) > 20 for epoch in epochs), "not neighbours"


def test_corpora_are_mixed_evenly_over_the_epoch():
    order = mixture((1000, 1), (1000, 3)).epoch(0)
    shares = [(part >= 1000).mean() for part in np.array_split(order, 10)]
    assert min(shares) > 0.65 and max(shares) < 0.85


@pytest.fixture
def mixed(cache_of):
    """Pairs, then texts, then pairs: documents are told by their first target token."""
    caches = [cache_of([([5, 6], [100 + i]) for i in range(4)]), cache_of([[200, 7, 7, 7, 7], [201]]),
              cache_of([([8] * 9, [300 + i, 9]) for i in range(3)])]
    return TokenCache(*(cache.folders[0] for cache in caches))


def samples_of(cache, weights=None):
    return Samples(cache, max_source_tokens=6, max_target_tokens=3, row_tokens=20, weights=weights)


def test_pairs_and_texts_share_an_epoch(mixed):
    samples = samples_of(mixed, {"a": 1.0, "b": 2.0, "c": 1.0})
    assert samples.document_S.tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert [samples.canvas(sample)[0] for sample in range(10)] == [100, 101, 102, 103, 200, 7, 201, 300, 301, 302]
    assert samples.source_tokens_S.tolist() == [4] * 4 + [0] * 3 + [6] * 3
    assert (samples.sources_cut, samples.targets_cut) == (3, 0)
    assert [tuple(part) for part in samples.parts] == [("a", 0, 4, 1), ("b", 4, 7, 2), ("c", 7, 10, 1)]
    assert Counter(Mixture(samples.parts, 0).epoch(0).tolist()) == Counter([*range(10), 4, 5, 6])


def test_shares_of_the_corpora_are_said(mixed):
    lines = samples_of(mixed, {"a": 0.5, "b": 2.0, "c": 1.0}).describe().splitlines()
    assert lines[1:] == ["  a: 2 of an epoch's 11 samples (0.5 x 4), 23.7% of its tokens",
                         "  b: 6 of an epoch's 11 samples (2 x 3), 30.5% of its tokens",
                         "  c: 3 of an epoch's 11 samples (1 x 3), 45.8% of its tokens"]
    assert len(samples_of(TokenCache(mixed.folders[0])).describe().splitlines()) == 1
