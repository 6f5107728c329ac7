import numpy as np
import pytest

from trainer.data.mixture import Mixture, Part, _mix, keyed_order
from trainer.data.rows import RowStream, pack_rows


def test_hash_is_splitmix64():
    assert int(_mix(np.uint64(0))) == 0xE220A8397B1DCDAF  # first output of the published generator for seed 0


def test_keyed_order_never_changes():
    assert keyed_order(8, 0, 0).tolist() == [0, 7, 2, 5, 4, 6, 3, 1]
    assert keyed_order(8, 12345, 7).tolist() == [5, 3, 4, 2, 7, 0, 1, 6]


def test_keyed_order_is_a_fair_permutation():
    orders = np.array([keyed_order(10, 3, epoch) for epoch in range(4000)])
    assert (np.sort(orders, 1) == np.arange(10)).all()
    counts = np.array([[(orders[:, place] == thing).sum() for thing in range(10)] for place in range(10)])
    assert abs(counts - 400).max() < 5 * (400 * 0.9) ** 0.5, "five standard deviations"
    assert keyed_order(10, 3, 1).tolist() != keyed_order(10, 1, 3).tolist()
    assert keyed_order(10, -1).tolist() != keyed_order(10, 1).tolist()


def _reference(tokens, order, row_tokens, lookahead):
    """The rule as the docstring has it, with lists."""
    order, waiting, rows = list(order), [], []
    while order or waiting:
        row, room = [], row_tokens
        while True:
            while order and len(waiting) < lookahead:
                waiting.append(order.pop(0))
            fitting = [sample for sample in waiting if tokens[sample] <= room]
            if not fitting:
                break
            chosen = waiting[0] if not row else max(fitting, key=lambda sample: tokens[sample])
            waiting.remove(chosen)
            row.append(chosen)
            room -= tokens[chosen]
        rows.append(row)
    return rows


@pytest.mark.parametrize("lookahead", [1, 4, 50])
@pytest.mark.parametrize("longest", [3, 40, 100])
def test_rows_equal_reference(lookahead, longest):
    random = np.random.default_rng(longest)
    tokens = random.integers(1, longest + 1, 200)
    order = random.permutation(200)
    samples, starts = pack_rows(tokens, order, 100, lookahead)
    rows = [row.tolist() for row in np.split(samples, starts[1:-1])]
    assert rows == _reference(tokens.tolist(), order, 100, lookahead)
    assert sorted(samples.tolist()) == list(range(200))
    assert max(tokens[row].sum() for row in rows) <= 100


def stream_of(tokens, seed, **more):
    """Rows of a single corpus."""
    return RowStream(tokens, Mixture([Part("all", 0, len(tokens), 1.0)], seed), **more)


def test_lookahead_fills_rows():
    tokens = np.random.default_rng(0).integers(300, 4000, 3000)
    fills = []
    for lookahead in (1, 256):
        _, _, rows = stream_of(tokens, row_tokens=8192, lookahead=lookahead, seed=1).locate(0)
        fills.append(tokens.sum() / (rows * 8192))  # an epoch holds every sample once
    assert fills[0] < 0.85 and fills[1] > 0.98


@pytest.mark.parametrize("seed", [0, 5])
def test_every_epoch_holds_every_sample_once(seed):
    tokens = np.random.default_rng(seed).integers(1, 60, 97)
    stream = stream_of(tokens, row_tokens=100, lookahead=8, seed=seed)
    row, orders = 0, []
    for epoch in range(5):
        found, place = [], 0
        while stream.locate(row)[0] == epoch:
            assert stream.locate(row)[1] == place
            found += stream[row].tolist()
            row, place = row + 1, place + 1
        assert stream.locate(row - 1)[2] == place
        assert sorted(found) == list(range(97)), "dropped or repeated"
        orders.append(found)
    assert len({tuple(order) for order in orders}) == 5, "epochs differ"


def test_access_in_any_order_is_the_same():
    tokens = np.random.default_rng(2).integers(1, 60, 50)
    forward = stream_of(tokens, row_tokens=100, lookahead=8, seed=9)
    rows = [forward[row].tolist() for row in range(120)]
    jumping = stream_of(tokens, row_tokens=100, lookahead=8, seed=9)
    for row in [119, 0, 60, 30, 118, 1, 90]:
        assert jumping[row].tolist() == rows[row]


def test_work_for_late_rows_is_done_once(monkeypatch):
    packed = []
    monkeypatch.setattr("trainer.data.rows.pack_rows", lambda *args: packed.append(1) or pack_rows(*args))
    stream = stream_of(np.full(10, 10), row_tokens=50, lookahead=4, seed=0)  # two rows an epoch
    assert stream.locate(20_000) == (10_000, 0, 2)
    assert len(packed) == 10_001
    for row in range(19_990, 20_002):
        stream.locate(row)
    assert len(packed) == 10_001
