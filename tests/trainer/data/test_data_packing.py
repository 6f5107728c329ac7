import numpy as np
import pytest
import torch

from model.errors import ConfigError
from model.packing import Segment, pack, source_segment
from trainer.data.packing import Samples
from trainer.errors import DataError

BOS, EOS, PAD = 1, 2, 3


def test_one_batch_by_hand(cache_of):
    samples = Samples(cache_of([([11, 12], [21, 22]), ([13], [23, 24, 25, 26])]), max_source_tokens=9,
                      max_target_tokens=3, row_tokens=10, draws=2)
    batch = pack([samples.segment(1), samples.segment(0)], np.array([0, 1]), 2, np.array([[5, 7], [4, 6]]), 8)
    first, second = [BOS, 13, EOS], [BOS, 11, 12, EOS]
    expected = {
        "tokens_T": first + [23, 24, 25] * 2 + second + [21, 22, EOS] * 2,
        "document_T": [0] * 9 + [1] * 10,
        "position_T": [0, 1, 2] + [3, 4, 5] * 2 + [0, 1, 2, 3] + [4, 5, 6] * 2,
        "is_target_T": [False] * 3 + [True] * 6 + [False] * 4 + [True] * 6,
        "draw_T": [0] * 6 + [1] * 3 + [0] * 7 + [1] * 3,
        "in_loss_T": [False] * 3 + [True] * 6 + [False] * 4 + [True] * 6,
        "row_T": [0] * 9 + [1] * 10,
        "copy_T": [0] * 6 + [1] * 3 + [2] * 7 + [3] * 3,
        "sample_C": [1, 1, 0, 0],
        "draw_C": [0, 1, 0, 1],
        "stratum_C": [5, 7, 4, 6],
    }
    for name, values in expected.items():
        value = getattr(batch, name)
        assert value.tolist() == values, name
        assert value.dtype == (torch.bool if name in ("is_target_T", "in_loss_T") else torch.int64), name
    assert (batch.rows, batch.documents, batch.strata) == (2, 2, 8)


@pytest.mark.parametrize(("target", "canvas", "loss"), [
    ([], [EOS, PAD, PAD], 1),
    ([7], [7, EOS, PAD], 2),
    ([7, 8], [7, 8, EOS], 3),
    ([7, 8, 9], [7, 8, 9], 3),
    ([7, 8, 9, 10], [7, 8, 9], 3),
])
def test_canvas(cache_of, target, canvas, loss):
    samples = Samples(cache_of([([5], target)]), max_source_tokens=0, max_target_tokens=3, row_tokens=100)
    segment = samples.segment(0)
    assert segment.canvas.tolist() == canvas and segment.loss_tokens == loss == samples.loss_tokens_S[0]
    assert samples.targets_cut == (len(target) > 2)
    batch = pack([segment], np.array([0]), 1, np.array([[0]]), 1)
    assert batch.in_loss_T.tolist() == [False] * 3 + [True] * loss + [False] * (3 - loss)


@pytest.mark.parametrize(("limit", "row", "source", "cut", "cut_to_row"), [
    (0, 100, [BOS, 5, 6, 7, 8, EOS], 0, 0),
    (6, 100, [BOS, 5, 6, 7, 8, EOS], 0, 0),
    (5, 100, [BOS, 5, 6, 7, EOS], 1, 0),
    (5, 10, [BOS, 5, 6, EOS], 1, 1),
    (0, 10, [BOS, 5, 6, EOS], 0, 1),
])
def test_source_is_cut_to_its_limit_and_to_the_row(cache_of, limit, row, source, cut, cut_to_row):
    samples = Samples(cache_of([([5, 6, 7, 8], [9])]), max_source_tokens=limit, max_target_tokens=3,
                      row_tokens=row, draws=2)
    assert samples.source(0).tolist() == source
    assert samples.tokens_S.tolist() == [len(source) + 6]
    assert (samples.sources_cut, samples.sources_cut_to_row) == (cut, cut_to_row)


@pytest.mark.parametrize("length", range(8))
def test_texts_are_cut_into_chunks(cache_of, length):
    text = list(range(10, 10 + length))
    samples = Samples(cache_of([[99], text, [98]]), max_source_tokens=0, max_target_tokens=3, row_tokens=6, draws=2)
    mine = [samples.segment(s) for s in range(len(samples)) if samples.document_S[s] == 1]
    loss = [token for segment in mine for token in segment.canvas[:segment.loss_tokens].tolist()]
    assert loss == (text if length % 3 == 0 else [*text, EOS]), "</s> where there is room for it"
    assert all(len(segment.canvas) == 3 and not len(segment.source) for segment in mine)
    assert all((segment.canvas[segment.loss_tokens:] == PAD).all() for segment in mine)
    assert [segment.sample for segment in mine] == list(range(1, 1 + len(mine)))
    batch = pack(mine, np.zeros(len(mine), int), 1, np.zeros((len(mine), 2), int), 1) if mine else None
    assert batch is None or batch.position_T.tolist() == [0, 1, 2] * 2 * len(mine)


def _reference(segments, rows, draws):
    """Field by field and token by token."""
    out = []
    for document, (segment, row) in enumerate(zip(segments, rows, strict=True)):
        for position, token in enumerate(segment.source):
            out.append((token, document, position, False, 0, False, row, document * draws))
        for draw in range(draws):
            for offset, token in enumerate(segment.canvas):
                out.append((token, document, len(segment.source) + offset, True, draw,
                            offset < segment.loss_tokens, row, document * draws + draw))
    return zip(*out, strict=True)


@pytest.mark.parametrize("draws", [1, 3])
def test_pack_equals_reference(draws):
    random = np.random.default_rng(draws)
    segments = [Segment(random.integers(4, 50, random.integers(0, 6)), random.integers(4, 50, 5),
                        int(random.integers(1, 6)), i) for i in range(20)]
    rows = np.sort(random.integers(0, 4, 20))
    batch = pack(segments, rows, 4, np.arange(20 * draws).reshape(20, draws), 20 * draws)
    names = ("tokens_T", "document_T", "position_T", "is_target_T", "draw_T", "in_loss_T", "row_T", "copy_T")
    for name, values in zip(names, _reference(segments, rows, draws), strict=True):
        assert getattr(batch, name).tolist() == list(values), name


def test_source_segment():
    assert source_segment([5, 6, 7], 0, BOS, EOS).tolist() == [BOS, 5, 6, 7, EOS]
    assert source_segment([5, 6, 7], 4, BOS, EOS).tolist() == [BOS, 5, 6, EOS]
    assert source_segment([], 4, BOS, EOS).tolist() == [BOS, EOS]


def test_canvases_that_do_not_fit_are_refused(cache_of):
    cache = cache_of([([5], [6])])
    lengths = {"max_source_tokens": 0, "max_target_tokens": 4, "draws": 2}
    assert len(Samples(cache, row_tokens=11, **lengths)) == 1
    with pytest.raises(ConfigError) as caught:
        Samples(cache, row_tokens=10, **lengths)
    assert str(caught.value) == ("data.row_tokens: 10 tokens cannot hold data.draws_per_source x "
                                 "data.max_target_tokens = 2 x 4 tokens and a source: raise it or lower the others")


def test_corpus_without_any_text_is_refused(cache_of):
    with pytest.raises(DataError, match="has no text to train on"):
        Samples(cache_of([[]]), max_source_tokens=0, max_target_tokens=4, row_tokens=8)


def test_description_counts_what_was_cut(cache_of):
    samples = Samples(cache_of([([5] * 9, [6]), ([5], [6] * 9), ([5], [6]), ([5], [6])]), max_source_tokens=8,
                      max_target_tokens=4, row_tokens=11)
    assert samples.describe() == ("4 documents, 4 samples, 16 source and 10 target tokens; cut: 25.0 % of sources "
                                  "to their limit, 25.0 % to the row, 25.0 % of targets")


def test_canvas_counts(cache_of):
    samples = Samples(cache_of([([5], [6, 6]), ([5], [7]), ([5], [8])]), max_source_tokens=0, max_target_tokens=4,
                      row_tokens=20)
    counts = samples.canvas_counts()
    assert {token: int(counts[token]) for token in counts.nonzero()[0]} == {6: 2, 7: 1, 8: 1, EOS: 3, PAD: 5}
    assert len(counts) == 1000
    assert samples.canvas_counts(most=2).sum() == 8
