"""Adaptive time sampling: what it measures, what it draws, and that its sums add up over parts of a step."""

import json

import torch

from model.diffusion.adaptive_time import SLICES, AdaptiveTime, slice_sums
from tests.model.small import batch_of, small_config
from trainer.randomness import at_learned_times, training_draw


def measured(rise, tokens=200_000, steps=30):
    """Told of a cross-entropy that is `rise` of time, with noise."""
    times = AdaptiveTime()
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        time = torch.rand(tokens // steps, generator=generator)
        times.observe(slice_sums(time, rise(time) + 0.3 * torch.randn(time.shape, generator=generator)))
    return times


def test_times_are_those_of_the_cross_entropys_inverse():
    """A cross-entropy that rises as a logistic curve: its quantiles come back, but for the share drawn evenly."""
    def rise(time):
        return 5 * torch.sigmoid(30 * (time - 0.4))

    times = measured(rise)
    u = (torch.arange(10_000) + 0.5) / 10_000
    t = times.draw(u)
    assert (t.diff() >= 0).all() and t.min() >= 0 and t.max() <= 1
    scaled = (rise(t) - rise(torch.zeros(()))) / (rise(torch.ones(())) - rise(torch.zeros(())))
    torch.testing.assert_close(0.85 * scaled + 0.15 * t, u, atol=0.03, rtol=0)
    share = torch.histc(t, SLICES, 0, 1) / len(t)
    torch.testing.assert_close(share.double(), times.density(), atol=2e-3, rtol=0)


def test_times_are_even_until_every_slice_is_measured_and_where_nothing_rises():
    u = torch.rand(100, generator=torch.Generator().manual_seed(0))
    times = AdaptiveTime()
    assert torch.equal(times.draw(u), u)
    times.observe(slice_sums(torch.full((50,), 0.3), torch.ones(50)))
    assert torch.equal(times.draw(u), u)
    times.observe(slice_sums((torch.arange(SLICES) + 0.5) / SLICES, torch.ones(SLICES)))
    torch.testing.assert_close(times.draw(u), u)


def test_sums_add_up_over_parts_and_are_kept_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    time, loss = torch.rand(1000, generator=generator), torch.rand(1000, generator=generator)
    whole = slice_sums(time, loss)
    torch.testing.assert_close(slice_sums(time[:300], loss[:300]) + slice_sums(time[300:], loss[300:]), whole)
    times = AdaptiveTime()
    times.observe(whole)
    times.observe(whole)
    again = AdaptiveTime()
    again.load(json.loads(json.dumps(times.state())))
    assert torch.equal(again.sums_2S, times.sums_2S) and torch.equal(again.sums_2S, 0.99 * whole + whole)


def test_training_times_are_warped_strata():
    times = measured(lambda time: 4 * time**3)
    batch, config = batch_of(list(range(10)), draws=2), small_config(time_sampling="adaptive")
    even = training_draw(batch, config, 0, 0)
    warped = at_learned_times(even, times)
    assert sorted((even.time_C * 20).long().tolist()) == list(range(20))
    assert torch.equal(warped.time_C, times.draw(even.time_C))
    assert torch.equal(warped.noise_NE, even.noise_NE)
    assert warped.time_C.mean() > even.time_C.mean() + 0.1
