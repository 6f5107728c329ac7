"""The whole model: what it computes must not depend on packing, batching, draws, caching or recomputation."""

from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from model.diffusion.process import NoisyTargets
from model.diffusion_lm import BatchPlan, DiffusionLM, NoiseDraw
from model.errors import ConfigError
from model.layers import gather_neighbours, neighbour_index
from model.sampling import SamplerSettings, sample
from tests.model.small import batch_of, small_config, small_model
from trainer.randomness import training_draw

F64 = torch.float64


def run(model: DiffusionLM, batch, seed: int = 0, loss_tokens: float = 1.0, tokens: float = 1.0,
        target_tokens: float = 1.0):
    plan = model.prepare(batch, device="cpu", dtype=F64)
    draw = training_draw(batch, model.config, seed, step=0)
    return model(batch, plan, draw, loss_tokens, tokens, target_tokens)


CONFIGS = {
    "long_doc": small_config(),
    "self_conditioning": small_config(self_conditioning=1.0),
    "joint": small_config(conditioning="joint"),
    "mse": replace(small_config(conditioning="joint", loss="mse", schedule="sqrt", absorbing=0.0),
                   input="noisy", bayes_skip=False, local_mixing=0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_documents_do_not_see_each_other(name):
    """Each document's loss is the same alone and packed with others, so the packed sum is the sum of the parts."""
    model = small_model(CONFIGS[name], F64)
    together = run(model, replace_strata(batch_of([3, 8, 5]), 99))
    alone = [run(model, replace_strata(batch_of([n]), 99)) for n in (3, 8, 5)]
    for term in together.terms:
        torch.testing.assert_close(together.terms[term], sum(part.terms[term] for part in alone), rtol=1e-9, atol=1e-9)


def replace_strata(batch, strata: int):
    """Times that depend on the sample, not on the batch it is in."""
    return replace(batch, stratum_C=batch.sample_C % strata, strata=strata)


def test_gradients_of_micro_batches_add_up_to_the_whole():
    model = small_model(CONFIGS["long_doc"], F64)
    batches = [replace_strata(batch_of(samples), 99) for samples in ([3, 8, 5], [3], [8, 5])]
    whole = batches[0]
    counts = int(whole.in_loss_T.sum()), len(whole), int(whole.is_target_T.sum())
    grads = []
    for batch in batches:
        model.zero_grad()
        run(model, batch, 0, *counts).total.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for whole, one, two in zip(*grads, strict=True):
        torch.testing.assert_close(whole, one + two, rtol=1e-8, atol=1e-10)
    assert all(g.abs().max() > 0 for g in grads[0])


def test_draws_in_one_pass_equal_separate_passes():
    """Several noised copies of a target share their source's pass and do not see each other."""
    model = small_model(CONFIGS["long_doc"], F64)
    batch = batch_of([3, 8], draws=3)
    together = run(model, batch)
    total = 0
    for draw in range(3):
        kept = (~batch.is_target_T | (batch.draw_T == draw)).nonzero().flatten()
        part = batch.take(kept)
        chosen = (batch.draw_C == draw).nonzero().flatten()
        part = replace(part, draw_T=torch.zeros_like(part.draw_T), copy_T=part.document_T,
                       sample_C=batch.sample_C[chosen], draw_C=batch.draw_C[chosen], stratum_C=batch.stratum_C[chosen])
        total = total + run(model, part).terms["cross_entropy"]
    torch.testing.assert_close(together.terms["cross_entropy"], total, rtol=1e-7, atol=0)  # times are fp32


def test_joint_conditioning_lets_the_source_see_the_target_and_cached_does_not():
    for conditioning, changes in (("joint", True), ("cached", False)):
        model = small_model(small_config(conditioning=conditioning), F64)
        batch = batch_of([3])
        plan = model.prepare(batch, device="cpu", dtype=F64)
        hidden = []
        for scale in (0.0, 1.0):
            inputs = torch.randn(len(batch), model.config.embed_dim, dtype=F64,
                                 generator=torch.Generator().manual_seed(0))
            inputs[batch.is_target_T] *= scale
            level = torch.tensor([-3.0 * scale])
            keys_values = model.denoiser(inputs, level, plan.stream)[1]
            hidden.append(keys_values[-1][0][~batch.is_target_T])
        assert torch.allclose(hidden[0], hidden[1], rtol=1e-10, atol=1e-12) != changes


@pytest.mark.parametrize("self_conditioning", [0.0, 0.5])
def test_cached_sources_equal_computing_them_at_every_step(self_conditioning):
    """One step against cached keys and values, with MoE, RoPE, global tokens and packing, equals the full pass."""
    model = small_model(small_config(self_conditioning=self_conditioning), F64)
    batch = batch_of([3, 8, 5])
    order = torch.argsort(batch.is_target_T.int(), stable=True)
    settings = {"device": "cpu", "dtype": F64}

    def stream(part, queries):
        return model.denoiser.prepare(part.tokens_T, part.document_T, part.position_T, part.is_target_T, part.draw_T,
                                      part.copy_T, 3, part.row_T, part.rows, queries=queries, **settings)

    count = int(batch.is_target_T.sum())
    generator = torch.Generator().manual_seed(0)
    z, guess = torch.randn(2, count, 16, generator=generator, dtype=F64)
    level_C = torch.tensor([-2.0, -1.0, -4.0])
    noisy = NoisyTargets(z, torch.arange(count) % 5 == 0, level_C[batch.copy_T[batch.is_target_T]])
    sources = batch.take((~batch.is_target_T).nonzero().flatten())
    cache = model.encode_sources(sources, stream(sources, "all"))
    cached, _ = model.predict_targets(noisy, guess, level_C, stream(batch.take(order), "target"), cache)
    whole, _ = model.predict_packed(batch, model.prepare(batch, **settings), noisy, guess, level_C)
    torch.testing.assert_close(cached, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_last_block_leaves_sources_out(layers):
    """The same targets and gradients as when it works out every token, though its experts see targets only."""
    model = small_model(replace(small_config(), layers=layers), F64)
    batch = batch_of([3, 8, 5], draws=2)
    inputs = torch.randn(len(batch), model.config.embed_dim, dtype=F64, generator=torch.Generator().manual_seed(0))
    level_C = torch.linspace(-4, 1, batch.sample_C.numel())
    passed = []
    model.denoiser.blocks[-1].moe.register_forward_pre_hook(lambda module, given: passed.append(len(given[0])))
    found = []
    for last in ("all", "target"):
        plan = model.denoiser.prepare(
            batch.tokens_T, batch.document_T, batch.position_T, batch.is_target_T, batch.draw_T, batch.copy_T,
            batch.sample_C.numel(), batch.row_T, batch.rows, device="cpu", dtype=F64, last=last)
        model.zero_grad()
        hidden, keys_values, _ = model.denoiser(inputs, level_C, plan)
        hidden = hidden[batch.is_target_T] if last == "all" else hidden
        hidden.square().sum().backward()
        found.append([hidden, *(part for pair in keys_values for part in pair),
                      *(p.grad for p in model.denoiser.parameters() if p.grad is not None)])
    assert passed == [len(batch), int(batch.is_target_T.sum())]
    for whole, targets_only in zip(*found, strict=True):
        torch.testing.assert_close(targets_only, whole, rtol=1e-9, atol=1e-9)


def test_recomputing_activations_changes_nothing_but_what_is_kept():
    model = small_model(CONFIGS["long_doc"], F64)
    grads, kept = [], []
    for recompute in (frozenset(), frozenset({1}), frozenset(range(model.config.layers))):
        model.denoiser.recompute = recompute
        model.zero_grad()
        kept.append(0)

        def count(tensor):
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            total = run(model, batch_of([3, 8])).total
        total.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, *others in zip(*grads, strict=True):
        for recomputed in others:
            torch.testing.assert_close(plain, recomputed, rtol=1e-12, atol=1e-13)
    assert kept[0] > kept[1] > kept[2]


def test_untrained_model_predicts_the_context_free_posterior():
    config = small_config()
    model = DiffusionLM(config)
    model.init_weights(0)
    batch = batch_of([3, 8])
    plan, draw = model.prepare(batch, device="cpu", dtype=torch.float32), training_draw(batch, config, 0, 0)
    torch.testing.assert_close(model(batch, plan, draw, 1.0, 1.0, 1.0).cross_entropy_M,
                               model.context_free_cross_entropy(batch, plan, draw))


def test_filler_is_neither_trained_on_nor_predicted():
    model = small_model(CONFIGS["long_doc"], F64)
    batch = batch_of([3, 8])
    plan = model.prepare(batch, device="cpu", dtype=F64)
    trained = batch.tokens_T[plan.target_N[plan.loss_of_target_M]]
    assert (trained != model.config.pad_id).all() and (trained == model.config.eos_id).sum() == 2
    logits = model.logits(torch.zeros(4, model.config.vocab_size), model.rows())
    assert (logits[:, model.config.pad_id] == -torch.inf).all()
    assert (sample(small_model(CONFIGS["long_doc"]), batch, SamplerSettings(steps=3)).tokens_CL != 3).all()


def test_training_noise_belongs_to_the_sample():
    config = small_config(self_conditioning=0.5)
    config = replace(config, moe=replace(config.moe, jitter=0.1))
    one = training_draw(replace_strata(batch_of([3, 8, 5], draws=2), 99), config, seed=4, step=7)
    other = training_draw(replace_strata(batch_of([8], draws=2), 99), config, seed=4, step=7)
    assert torch.equal(one.noise_NE[24:48], other.noise_NE) and torch.equal(one.uniform_N[24:48], other.uniform_N)
    assert torch.equal(one.time_C[2:4], other.time_C) and torch.equal(one.guess_C[2:4], other.guess_C)
    before = len(batch_of([3], draws=2))
    assert torch.equal(one.jitter_T[before:before + len(other.jitter_T)], other.jitter_T)
    later = training_draw(replace_strata(batch_of([8], draws=2), 99), config, seed=4, step=8)
    assert not torch.equal(later.noise_NE, other.noise_NE)


def test_stratified_times_cover_every_slice_once():
    batch = batch_of(list(range(10)), draws=2)
    slices = (training_draw(batch, small_config(), 0, 0).time_C * 20).long()
    assert sorted(slices.tolist()) == list(range(20))
    loose = (training_draw(batch, small_config(time_sampling="uniform"), 0, 0).time_C * 20).long()
    assert sorted(loose.tolist()) != list(range(20))


def test_mse_terms_are_their_formulas():
    model = small_model(CONFIGS["mse"], F64)
    batch = batch_of([3])
    plan: BatchPlan = model.prepare(batch, device="cpu", dtype=F64)
    draw: NoiseDraw = training_draw(batch, model.config, 0, 0)
    report = model(batch, plan, draw, 1.0, 1.0, 1.0)
    rows = model.rows()
    answer = batch.tokens_T[plan.target_N[plan.loss_of_target_M]]
    clean = rows[answer]
    free = (clean @ rows.T).index_fill(1, torch.tensor([3]), -torch.inf)
    torch.testing.assert_close(report.terms["rounding"], -free.log_softmax(-1)[range(len(answer)), answer].sum(),
                               check_dtype=False)
    assert report.terms["mse"] > 0
    weights = model.config.moe
    expected = (report.terms["mse"] + report.terms["rounding"] + weights.balance_weight * report.terms["balance"]
                + weights.z_weight * report.terms["router_z"])
    torch.testing.assert_close(report.total.detach(), expected, check_dtype=False)


def test_neighbours_stay_within_their_segment():
    document = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    side = torch.tensor([0, 0, 1, 1, 1, 0, 0]).bool()
    draw = torch.tensor([0, 0, 0, 1, 1, 0, 0])
    near = neighbour_index(document, side, draw, 3)
    assert near.tolist() == [[7, 0, 1], [0, 1, 7], [7, 2, 7], [7, 3, 4], [3, 4, 7], [7, 5, 6], [5, 6, 7]]
    gathered = gather_neighbours(torch.arange(1.0, 8.0)[:, None], near)
    assert gathered[2].tolist() == [0.0, 3.0, 0.0] and gathered[4].tolist() == [4.0, 5.0, 0.0]


@pytest.mark.parametrize("changes, key", [
    ({"width": 30}, "model.attention.heads"), ({"local_mixing": 4}, "model.local_mixing"),
    ({"embed_dim": 0}, "model.embed_dim"), ({"input": "clean"}, "model.input"), ({"time_dim": 7}, "model.time_dim")])
def test_impossible_shapes_are_refused_by_key(changes, key):
    with pytest.raises(ConfigError) as error:
        replace(small_config(), **changes).validate()
    assert error.value.key == key


@pytest.mark.parametrize("changes, key", [
    ({"absorbing": 1.5}, "absorbing"), ({"log_snr_range": [2.0, -2.0]}, "log_snr_range"),
    ({"log_snr_range": [-2.0, 2.0], "schedule": "sqrt"}, "log_snr_range"), ({"loss": "l1"}, "loss"),
    ({"loss": "mse"}, "loss"), ({"self_conditioning": -0.1}, "self_conditioning")])
def test_impossible_diffusions_are_refused_by_key(changes, key):
    config: ModelConfig = small_config(**changes)
    with pytest.raises(ConfigError) as error:
        config.validate()
    assert error.value.key == f"model.diffusion.{key}"
