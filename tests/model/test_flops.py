"""Counted operations against PyTorch's own counter, which sees every matrix product that is executed."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.flops import forward_flops, training_flops
from tests.model.small import batch_of, small_config, small_model
from trainer.randomness import training_draw

CONFIGS = {
    "long_doc": small_config(),
    "self_conditioning": small_config(self_conditioning=1.0),
    "no prior": replace(small_config(), input="noisy", bayes_skip=False, local_mixing=0),
    "mse": replace(small_config(conditioning="joint", loss="mse"), input="noisy", bayes_skip=False),
}


def dense(config):
    """Windows over everything and a backend that computes whole segments: executed pairs are the allowed ones."""
    attention = replace(config.attention, window=400, dilation="1", global_tokens="none", backend="reference")
    return replace(config, attention=attention, moe=replace(config.moe, shared_ffn=8, backend="reference"))


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_equal_what_is_executed(name):
    config = dense(CONFIGS[name])
    model = small_model(config)
    batch = batch_of([3, 8, 5])
    plan = model.prepare(batch, device="cpu", dtype=torch.float32)
    draw = training_draw(batch, config, 0, 0)
    with FlopCounterMode(display=False) as counter:
        report = model(batch, plan, draw, 1.0, 1.0, 1.0)
    executed = counter.get_total_flops()
    if config.diffusion.loss == "mse":  # rounding and monitoring logits, which only this loss computes
        executed -= 2 * 2 * plan.loss_of_target_M.numel() * config.embed_dim * config.vocab_size
    expected = forward_flops(config, plan, 3, plan.loss_of_target_M.numel())
    if config.diffusion.self_conditioning > 0:
        # Both passes share one posterior; its second count stands for the mean that the first pass ends with.
        expected += forward_flops(config, plan, 3, plan.target_N.numel())
    assert executed == pytest.approx(expected, rel=0.01)
    if config.diffusion.self_conditioning == 0:
        with FlopCounterMode(display=False) as counter:
            report.total.backward()
        assert executed + counter.get_total_flops() == pytest.approx(training_flops(config, plan, 3), rel=0.1)


def test_only_allowed_pairs_and_chosen_experts_are_counted():
    config = small_config()
    batch = batch_of([3, 8, 5])

    def count(**changes):
        changed = replace(config, **changes)
        return forward_flops(changed, small_model(changed).prepare(batch, device="cpu", dtype=torch.float32), 3, 30)

    wider = count(attention=replace(config.attention, window=16))
    assert count() < wider < count(attention=replace(config.attention, window=400))
    more_experts = count(moe=replace(config.moe, experts=8))
    passed = len(batch) * (config.layers - 1) + int(batch.is_target_T.sum())  # the last layer takes targets only
    assert more_experts - count() == 2 * passed * 4 * config.width  # the router's columns alone
    assert count(moe=replace(config.moe, top_k=4)) > count()
