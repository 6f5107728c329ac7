"""Every switch of the model that a recipe sets changes what it should, and nothing else.

A model is looked at part by part, each part given the same inputs whatever the others do. The table says for each key
which parts a change of it may be seen in; all others must be equal to the bit.
"""

from dataclasses import fields, is_dataclass, replace

import pytest
import torch

from model.attention.pattern import allowed, global_tokens, layer_patterns
from model.batch import TokenLayout
from model.config import ModelConfig
from model.diffusion.process import NoisyTargets, add_noise
from model.diffusion_lm import DiffusionLM
from model.moe.layer import MoELayer
from tests.model.small import batch_of, small_config, small_model
from tests.trainer.launching import ROOT
from trainer.config import RunConfig
from trainer.presets import RECIPES
from trainer.randomness import training_draw

BASE = small_config(time_sampling="stratified")
MSE = {"diffusion.loss": "mse", "bayes_skip": False}  # a predicted embedding has no logits to add to
DISCRETE = {"diffusion.schedule": "sqrt", "diffusion.steps": 50}

SWITCHES = {
    # key: (another value, parts that change, what else both sides have)
    "attention.window": (4, {"attention"}, {}),
    "attention.dilation": ("3", {"attention"}, {}),
    "attention.global_tokens": ("none", {"attention"}, {}),
    "moe.experts": (6, {"parameters", "experts"}, {}),
    "moe.top_k": (1, {"experts"}, {}),
    "moe.ffn": (40, {"parameters", "experts"}, {}),
    "moe.gated": (False, {"parameters", "experts"}, {}),
    "moe.balance_weight": (0.3, {"loss"}, {}),
    "moe.z_weight": (0.3, {"loss"}, {}),
    "input": ("noisy", {"input"}, {}),
    "bayes_skip": (False, {"skip"}, {}),
    "local_mixing": (5, {"parameters", "neighbours"}, {}),
    "diffusion.schedule": ("cosine", {"levels"}, {}),
    "diffusion.time_sampling": ("uniform", {"times"}, {}),
    "diffusion.absorbing": (0.9, {"absorption"}, {}),
    "diffusion.loss": ("mse", {"parameters", "loss"}, {"bayes_skip": False}),
    "diffusion.conditioning": ("joint", {"attention", "neighbours", "conditions"}, {}),
    "normalize_embeddings": (False, {"table", "input"}, DISCRETE),
    "diffusion.steps": (60, {"levels"}, {"diffusion.schedule": "sqrt"}),
    "diffusion.loss_over": ("canvas", {"trained", "filler"}, {}),
    "diffusion.embedding_noise": (True, {"embedding noise"}, DISCRETE),
    "diffusion.terminal_loss": (True, {"loss"}, MSE),
    "diffusion.self_conditioning": (0.5, {"parameters", "guesses", "input"}, {}),
}

OF_THE_OTHER_NETWORK = {"network", "dropout", "max_positions"}  # tests/model/test_bert_denoiser.py


def keys_of_recipes() -> set[str]:
    """Keys below `model` that any recipe sets."""
    def leaves(values: dict, prefix: str = ""):
        for name, value in values.items():
            yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else (prefix + name,)

    return {key for recipe in RECIPES.values() for key in leaves(recipe(RunConfig())["model"])}


def changed(config: ModelConfig, values: dict) -> ModelConfig:
    """The configuration with dotted keys set."""
    for key, value in values.items():
        head, _, rest = key.partition(".")
        config = replace(config, **{head: changed(getattr(config, head), {rest: value}) if rest else value})
    return config


def parts(config: ModelConfig) -> dict[str, list]:
    """What each part of the model does with inputs that do not depend on the others."""
    model = small_model(config)
    fixed = DiffusionLM(BASE)
    fixed.init_weights(0)
    fixed.prior_count_V.copy_(model.prior_count_V)
    batch = batch_of([3, 8])
    draw = training_draw(batch, config, 0, 0)
    generator = torch.Generator().manual_seed(5)
    count = int(batch.is_target_T.sum())
    level = torch.linspace(-5, 1, count)
    noise, uniform = torch.randn(count, config.embed_dim, generator=generator), torch.rand(count, generator=generator)
    absorbed = add_noise(torch.zeros_like(noise), level, noise, uniform, config.diffusion.absorbing)
    noisy = NoisyTargets(noise, uniform < 0.2, level)
    plan = model.prepare(batch, device="cpu", dtype=torch.float32)

    table, prediction = model.rows(), torch.zeros(1, config.vocab_size)
    model.embedding.data.copy_(fixed.embedding)
    model.absorbing.data.zero_()
    fed = []
    model.denoiser.input.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
    model.predict_packed(batch, plan, noisy, torch.full_like(noise, 0.5), torch.zeros(2))
    own = fed[0].view(len(batch), config.local_mixing, -1)[:, config.local_mixing // 2]  # without its neighbours

    layer = MoELayer(config.width, config.moe)
    layer.init_weights(0, 0)
    stream = torch.randn(len(batch), config.width, generator=generator)
    mixed, aux = layer(stream, batch.row_T, batch.rows)

    report = model(batch, plan, draw, 1.0, 1.0, 1.0)
    terms, moe = report.terms, BASE.moe
    rest = report.total - moe.balance_weight * terms["balance"] - moe.z_weight * terms["router_z"]
    by_token = [name for name in terms if name not in ("balance", "router_z")]
    trained = ["cross_entropy"] if by_token == ["cross_entropy"] else ["mse", "rounding"]
    agrees = torch.allclose(rest, sum(terms[name] for name in trained), rtol=1e-5)

    layout = TokenLayout(batch.document_T, batch.position_T, batch.is_target_T, batch.draw_T, global_tokens(
        config.attention.global_tokens, tokens_T=batch.tokens_T, document_T=batch.document_T,
        position_T=batch.position_T, is_target_T=batch.is_target_T, draw_T=batch.draw_T, eos_id=config.eos_id))
    prior = torch.randn(count, config.vocab_size, generator=generator)
    silent = torch.zeros(count, config.width)
    model.head.bias.data.zero_()
    return {
        "parameters": [{name: tuple(value.shape) for name, value in model.named_parameters()}],
        "times": [draw.time_C],
        "levels": [model.schedule.log_snr(torch.linspace(0.1, 0.9, 9))],
        "noise": [draw.noise_NE, draw.uniform_N],
        "embedding noise": [draw.embedding_noise_TE],
        "table": [table],
        "trained": [plan.scored_S],
        "filler": [bool(model._without_filler(prediction)[0, config.pad_id].isinf())],
        "guesses": [draw.guess_C],
        "absorption": [absorbed.absorbed_T, absorbed.z_TE],
        "input": [own[:, :config.embed_dim], own.shape[1]],
        "neighbours": [plan.stream.neighbour_TW],
        "attention": [allowed(layout, pattern) for pattern in layer_patterns(config)],
        "conditions": [plan.stream.condition_T],
        "experts": [mixed, aux.expert_index_Tk, aux.balance_sum, aux.z_sum],
        "skip": [torch.equal(model._output(silent, prior), prior)],
        "loss": [by_token, agrees],
    }


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("key", SWITCHES)
def test_a_switch_changes_its_parts_and_no_other(key):
    value, expected, beside = SWITCHES[key]
    base = changed(BASE, beside)
    before, after = parts(base), parts(changed(base, {key: value}))
    found = {name for name in before
             if not all(same(a, b) for a, b in zip(before[name], after[name], strict=True))}
    assert found == expected


def test_every_switch_that_a_recipe_sets_is_in_the_table():
    assert keys_of_recipes() - SWITCHES.keys() == OF_THE_OTHER_NETWORK
    source = (ROOT / "tests" / "model" / "test_bert_denoiser.py").read_text()
    assert all(name in source for name in OF_THE_OTHER_NETWORK)


def test_the_table_names_switches_that_exist():
    def names(config, prefix=""):
        for item in fields(config):
            value = getattr(config, item.name)
            yield from names(value, f"{prefix}{item.name}.") if is_dataclass(value) else (prefix + item.name,)

    assert SWITCHES.keys() <= set(names(ModelConfig()))
