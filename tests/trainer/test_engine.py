"""Learning-rate schedules, and where in their documents tokens count as."""

import pytest
import torch

from tests.model.parity.golden import load
from tests.model.small import CANVAS, batch_of
from trainer.config import OptimConfig
from trainer.engine import learning_rate, update_average
from trainer.metrics import document_tenths


def rates(**changes) -> list[float]:
    optim = OptimConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1, **changes)
    return [learning_rate(optim, step, 111) for step in range(111)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_rises_linearly_to_the_highest_rate(schedule):
    assert rates(schedule=schedule)[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert max(rates(schedule=schedule)) == pytest.approx(1.0)


def test_schedules_at_known_steps():
    assert set(rates(schedule="constant")[10:]) == {1.0}
    assert rates(schedule="linear")[60] == pytest.approx(0.55) and rates(schedule="linear")[110] == pytest.approx(0.1)
    assert rates(schedule="cosine")[60] == pytest.approx(0.55) and rates(schedule="cosine")[110] == pytest.approx(0.1)
    assert rates(schedule="cosine")[35] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + 2 ** -0.5), abs=1e-9)
    wsd = rates(schedule="wsd", decay_fraction=0.2)
    assert set(wsd[10:88]) == {1.0} and wsd[89] < 1 and wsd[110] == pytest.approx(0.1)


def test_average_is_updated_as_the_original_does():
    golden = load("ema_update")
    average = golden["parameters"][0].clone()
    for parameters, expected in zip(golden["parameters"][1:], golden["ema"], strict=True):
        update_average([average], [parameters], 0.9999)
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-6)


def test_tokens_lie_in_tenths_of_their_own_document():
    batch = batch_of([0, 3], draws=2)  # sources of 9 and 30 tokens
    tenth = document_tenths(batch)
    for document, source in ((0, 9), (1, 30)):
        here = batch.document_T == document
        length = source + CANVAS
        assert torch.equal(tenth[here], batch.position_T[here] * 10 // length)
        assert tenth[here].min() == 0 and tenth[here].max() == 9
