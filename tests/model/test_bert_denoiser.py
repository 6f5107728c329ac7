"""DiffuSeq's network and losses on the packed stream: what must not depend on packing, and what each switch changes."""

from dataclasses import replace

import pytest
import torch

from model.batch import PackedBatch
from model.config import ModelConfig
from model.diffusion.loss_second_moment import LossSecondMoment
from model.diffusion_lm import DiffusionLM
from model.errors import ConfigError
from model.flops import forward_flops, training_flops
from model.layers import keyed_dropout, keyed_uniform
from tests.model.small import CANVAS, batch_of, small_config, small_model
from trainer.randomness import at_learned_times, evaluation_draw, training_draw

F64 = torch.float64


def bert_config(**diffusion) -> ModelConfig:
    """The recipe `diffuseq`, small."""
    chosen = {"schedule": "sqrt", "steps": 50, "time_sampling": "uniform", "absorbing": 0.0, "loss": "mse",
              "loss_over": "document", "embedding_noise": True, "terminal_loss": True, "conditioning": "joint"}
    config = small_config(**{**chosen, **diffusion})
    return replace(config, network="bert", normalize_embeddings=False, max_positions=64, dropout=0.2, input="noisy",
                   bayes_skip=False, local_mixing=0, attention=replace(
                       config.attention, window=128, dilation="1", global_tokens="none"),
                   moe=replace(config.moe, experts=1, top_k=1, gated=False, balance_weight=0.0, z_weight=0.0))


CONFIGS = {
    "diffuseq": bert_config(),
    "v2": bert_config(absorbing=0.5, absorbing_norm=0.01),
    "text": bert_config(loss_over="text"),
    "canvas of the sparse network": small_config(loss_over="canvas"),
    "no embedding noise": bert_config(embedding_noise=False, terminal_loss=False),
}


def run(model: DiffusionLM, samples: list[int], loss_tokens: float = 1.0, draws: int = 1, strata: int = 99):
    batch = batch_of(samples, draws)
    batch = replace(batch, stratum_C=batch.sample_C % strata, strata=strata)
    plan = model.prepare(batch, device="cpu", dtype=F64)
    return model(batch, plan, training_draw(batch, model.config, 0, step=0), loss_tokens, 1.0, 1.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_packing_and_accumulation_change_nothing(name):
    """Terms, losses of copies and gradients of documents together are the sums of those of each alone."""
    model = small_model(CONFIGS[name], F64)
    gradients, reports = [], []
    for parts in ([[3, 8, 5]], [[3], [8], [5]]):
        model.zero_grad()
        reports.append([run(model, part) for part in parts])
        sum(report.total for report in reports[-1]).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    (whole,), alone = reports
    for term in whole.terms:
        torch.testing.assert_close(whole.terms[term], sum(part.terms[term] for part in alone), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(whole.loss_C, torch.cat([part.loss_C for part in alone]), rtol=1e-6, atol=1e-7)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


def test_recomputing_activations_repeats_the_same_dropout():
    model, gradients = small_model(CONFIGS["diffuseq"], F64), []
    calls = []
    for index, block in enumerate(model.denoiser.blocks):
        block.register_forward_pre_hook(lambda module, given, index=index: calls.append(index))
    for model.denoiser.recompute in (frozenset(), frozenset({1}), frozenset({0, 1})):
        model.zero_grad()
        run(model, [3, 8]).total.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert calls == [0, 1, 0, 1, 1, 0, 1, 1, 0]  # forward, and backward again what was not kept
    for one, *others in zip(*gradients, strict=True):
        for other in others:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_dropout_follows_from_token_site_and_channel():
    key_T = torch.empty(3000, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(0))
    dropped = keyed_dropout(torch.ones(3000, 64), key_T, 0, 0.1)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    share = (dropped == 0).double()
    assert share.mean().item() == pytest.approx(0.1, abs=2e-3)
    assert share.mean(0).sub(0.1).abs().max() < 0.03 and share.mean(1).sub(0.1).abs().max() < 0.25
    assert torch.equal(keyed_dropout(torch.ones(5, 64), key_T[7:12], 0, 0.1), dropped[7:12])
    other = keyed_dropout(torch.ones(3000, 64), key_T, 1, 0.1) == 0
    assert (other & (dropped == 0)).double().mean().item() == pytest.approx(0.01, abs=2e-3)
    assert torch.equal(keyed_dropout(torch.ones(4, 2), None, 0, 0.9), torch.ones(4, 2))


def test_uniform_numbers_follow_from_token_and_channel():
    key_T = torch.empty(3000, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(0))
    uniform = keyed_uniform(key_T, 64)
    assert uniform.dtype == torch.float32 and uniform.min() >= 0 and uniform.max() < 1
    tenths = torch.histc(uniform, 10, 0, 1) / uniform.numel()
    assert tenths.sub(0.1).abs().max() < 3e-3 and uniform.mean(0).sub(0.5).abs().max() < 0.03
    assert torch.equal(keyed_uniform(key_T[7:12], 64), uniform[7:12])
    assert torch.corrcoef(torch.stack((uniform, keyed_uniform(key_T + 1, 64))).flatten(1))[0, 1].abs() < 0.01


def test_dropout_and_embedding_noise_are_for_training_alone():
    config, batch = CONFIGS["diffuseq"], batch_of([3, 8])
    draw = training_draw(batch, config, 0, 0)
    assert draw.embedding_noise_TE.shape == (len(batch), 16) and draw.dropout_T.shape == (len(batch),)
    still = evaluation_draw(batch, config, torch.tensor([0.3, 0.6]), 0)
    assert still.embedding_noise_TE is None and still.dropout_T is None
    plain = training_draw(batch, replace(CONFIGS["no embedding noise"], dropout=0.0), 0, 0)
    assert plain.embedding_noise_TE is None and plain.dropout_T is None
    for name in ("time_C", "noise_NE", "uniform_N"):
        assert torch.equal(getattr(draw, name), getattr(plain, name))
    alone = training_draw(batch_of([8]), config, 0, 0)
    assert torch.equal(alone.dropout_T, draw.dropout_T[batch.document_T == 1])
    assert torch.equal(alone.embedding_noise_TE, draw.embedding_noise_TE[batch.document_T == 1])


def test_loss_over_says_which_tokens_count_and_how():
    """From one model: the same errors, averaged over text, canvas or document."""
    base = replace(bert_config(embedding_noise=False, terminal_loss=False), dropout=0.0)
    models = {scope: small_model(replace(base, diffusion=replace(base.diffusion, loss_over=scope)), F64)
              for scope in ("text", "canvas", "document")}
    batch = batch_of([3, 8])
    draw, errors = training_draw(batch, base, 0, 0), {}
    for scope, model in models.items():
        seen = []
        model.head.register_forward_hook(lambda module, given, result, seen=seen: seen.append(result.detach()))
        plan = model.prepare(batch, device="cpu", dtype=F64)
        report = model(batch, plan, draw, 7.0, 1.0, 1.0)
        goal_SE = model.rows().detach()[batch.tokens_T[plan.scored_S]]
        error_S, document_S = (seen[0] - goal_SE).square().mean(-1), batch.document_T[plan.scored_S]
        means = [error_S[document_S == document].mean().item() for document in (0, 1)]
        expected = error_S.sum() / 7 if scope == "text" else sum(means) / 2
        assert report.terms["mse"].item() == pytest.approx(float(expected), rel=1e-6)
        errors[scope] = dict(zip(plan.scored_S.tolist(), error_S.tolist(), strict=True))
        filler = model.logits(seen[0], model.rows())[:, model.config.pad_id]
        assert filler.isinf().all() if scope == "text" else filler.isfinite().all()
    assert errors["text"].keys() == set(batch.in_loss_T.nonzero().flatten().tolist())
    assert errors["canvas"].keys() == set(batch.is_target_T.nonzero().flatten().tolist())
    assert len(errors["document"]) == len(batch)
    assert errors["text"].items() <= errors["canvas"].items() <= errors["document"].items()


def test_several_draws_of_a_canvas_count_alike():
    model = small_model(CONFIGS["canvas of the sparse network"], F64)
    report = run(model, [3, 8], draws=3, strata=6)
    torch.testing.assert_close(report.terms["cross_entropy"], report.loss_C.mean(), rtol=1e-6, atol=0)
    assert report.loss_C.shape == (6,) and report.cross_entropy_M.numel() < 6 * CANVAS


def test_importance_weights_scale_the_loss_and_nothing_that_is_logged():
    model = small_model(CONFIGS["v2"], F64)
    batch = replace(batch_of([3, 8]), strata=2)
    plan = model.prepare(batch, device="cpu", dtype=F64)
    draw = training_draw(batch, model.config, 0, 0)
    plain = model(batch, plan, draw, 1.0, 1.0, 1.0)
    weighted = model(batch, plan, replace(draw, weight_C=torch.tensor([2.0, 0.5])), 1.0, 1.0, 1.0)
    torch.testing.assert_close(weighted.total, (2.0 * plain.loss_C[0] + 0.5 * plain.loss_C[1]) / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(plain.total, plain.loss_C.mean(), rtol=1e-6, atol=0)
    assert plain.terms.keys() == weighted.terms.keys()
    assert all(torch.equal(plain.terms[name], weighted.terms[name]) for name in plain.terms)


def test_losses_are_measured_alike_in_any_division_of_the_batch():
    config = bert_config(time_sampling="loss_second_moment")
    model, sampler = small_model(config, F64), LossSecondMoment(50)
    batch = replace(batch_of([3, 8, 5]), strata=3)

    def measured(part: PackedBatch, chosen: list[int]) -> torch.Tensor:
        part = replace(part, stratum_C=torch.tensor(chosen), strata=3)
        plan = model.prepare(part, device="cpu", dtype=F64)
        draw = at_learned_times(training_draw(part, config, 0, 0), sampler)
        return sampler.measure(part, plan, draw, model(part, plan, draw, 1.0, 1.0, 1.0))

    whole = measured(batch, [2, 0, 1])
    torch.testing.assert_close(whole, measured(batch_of([3]), [2]) + measured(batch_of([8, 5]), [0, 1]))
    sampler.observe(whole)
    assert sampler.seen_T.sum() == 3
    for time, loss in whole.T:
        assert sampler.losses_TK[int(time * 50), 0] == loss


def test_absorbing_vector_is_there_only_where_it_is_used():
    assert small_model(CONFIGS["diffuseq"]).absorbing is None and small_model(CONFIGS["v2"]).absorbing is not None
    table = small_model(CONFIGS["diffuseq"]).embedding
    assert torch.equal(small_model(CONFIGS["diffuseq"]).rows(), table)  # neither normalised nor shifted
    normal = small_model(replace(CONFIGS["diffuseq"], normalize_embeddings=True)).rows()
    torch.testing.assert_close(normal.norm(dim=-1), torch.full((len(normal),), 4.0))


def test_starts_as_the_original_does():
    model = DiffusionLM(CONFIGS["v2"])
    model.init_weights(0)
    block = model.denoiser.blocks[0]
    for linear in (block.qkv, block.down, model.denoiser.time[0], model.head[2]):
        bound = linear.in_features ** -0.5
        assert 0.9 * bound < linear.weight.abs().max() <= bound and linear.bias.abs().max() <= bound
    assert model.denoiser.position.std().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(block.output_norm.weight, torch.ones(model.config.width))
    other = DiffusionLM(CONFIGS["v2"])
    other.init_weights(0)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_operations_are_counted():
    from torch.utils.flop_counter import FlopCounterMode
    config = CONFIGS["diffuseq"]
    config = replace(config, attention=replace(config.attention, window=400, backend="reference"))
    model, batch = small_model(config), batch_of([3, 8, 5])
    plan = model.prepare(batch, device="cpu", dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        report = model(batch, plan, training_draw(batch, config, 0, 0), 1.0, 1.0, 1.0)
    logits = 2 * (plan.scored_S.numel() + plan.judged_J.numel()) * config.embed_dim * config.vocab_size
    executed = counter.get_total_flops() - logits
    assert executed == pytest.approx(forward_flops(config, plan, 3, plan.scored_S.numel()), rel=0.01)
    with FlopCounterMode(display=False) as counter:
        report.total.backward()
    backward = counter.get_total_flops() - 2 * 2 * plan.scored_S.numel() * config.embed_dim * config.vocab_size
    assert executed + backward == pytest.approx(training_flops(config, plan, 3), rel=0.1)


def test_documents_longer_than_the_positions_are_refused():
    model = small_model(replace(CONFIGS["diffuseq"], max_positions=20))
    with pytest.raises(ConfigError, match="is 20, but a document has 42 tokens") as error:
        model.prepare(batch_of([3]), device="cpu", dtype=torch.float32)
    assert error.value.key == "model.max_positions"


@pytest.mark.parametrize("changes, key", [
    ({"network": "gpt"}, "model.network"), ({"dropout": 1.0}, "model.dropout"),
    ({"max_positions": 0}, "model.max_positions"), ({"input": "bayes"}, "model.input"),
    ({"local_mixing": 3}, "model.local_mixing")])
def test_impossible_networks_are_refused_by_key(changes, key):
    with pytest.raises(ConfigError) as error:
        replace(bert_config(), **changes).validate()
    assert error.value.key == key


@pytest.mark.parametrize("changes, key", [
    ({"steps": 0, "embedding_noise": False}, "steps"), ({"steps": 1}, "steps"), ({"schedule": "log_snr"}, "steps"),
    ({"conditioning": "cached"}, "loss_over"), ({"conditioning": "cached", "loss_over": "text"}, "conditioning"),
    ({"loss": "cross_entropy"}, "loss_over"), ({"absorbing_norm": 0.01}, "absorbing_norm"),
    ({"self_conditioning": 0.5}, "self_conditioning"), ({"loss_over": "source"}, "loss_over")])
def test_impossible_objectives_are_refused_by_key(changes, key):
    with pytest.raises(ConfigError) as error:
        bert_config(**changes).validate()
    assert error.value.key == f"model.diffusion.{key}"


@pytest.mark.parametrize("changes, key", [
    ({"schedule": "linear"}, "schedule"), ({"schedule": "sqrt", "embedding_noise": True}, "embedding_noise"),
    ({"terminal_loss": True}, "terminal_loss"), ({"time_sampling": "loss_second_moment"}, "time_sampling")])
def test_what_needs_discrete_time_or_mse_is_refused_without(changes, key):
    with pytest.raises(ConfigError) as error:
        small_config(**changes).validate()
    assert error.value.key == f"model.diffusion.{key}"
    with pytest.raises(ConfigError, match=r"only applies to model\.network = bert"):
        replace(small_config(), dropout=0.1).validate()
