"""Weights and settings of the original DiffuSeq (github.com/Shark-NLP/DiffuSeq, v1 and v2), as this model's.

Its checkpoints hold the word embeddings twice: the table is tied to the output, so its average was written once, as
`word_embedding.weight`, and `lm_head.weight` is the table that was not averaged. The original loads the latter over
the former: its published results are those of averaged weights with that table.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from model.config import AttentionConfig, DiffusionConfig, ModelConfig, MoEConfig
from model.errors import ConfigError

TABLES = {"live": "lm_head.weight", "averaged": "word_embedding.weight"}
"""Choice of the embedding table -> its key in the original. `live` gives the original's results."""


def original_config(arguments: dict, bert: dict) -> ModelConfig:
    """The model that a run folder describes: its training_args.json and the BERT config.json that it names as
    `config_name`. ConfigError for what this network cannot be."""
    def need(ok: bool, key: str, problem: str) -> None:
        if not ok:
            raise ConfigError(key, problem)

    need(bert.get("hidden_act", "gelu") == "gelu", "hidden_act", f"is {bert.get('hidden_act')}, must be gelu")
    need(bert.get("layer_norm_eps", 1e-12) == 1e-12, "layer_norm_eps",
         f"is {bert.get('layer_norm_eps')}, must be 1e-12")
    need(arguments["noise_schedule"] in ("sqrt", "cosine", "linear"), "noise_schedule",
         f"is {arguments['noise_schedule']}, must be sqrt, cosine or linear")
    need(arguments.get("predict_xstart", True), "predict_xstart", "is false: the network must predict embeddings")
    need(arguments.get("rescale_timesteps", True), "rescale_timesteps", "is false: times must be scaled to 1000")
    shifted, absorbs = arguments.get("learned_mean_embed", False), arguments.get("denoise", False)
    need(shifted == absorbs, "denoise", f"is {absorbs} with learned_mean_embed {shifted}: this model shifts towards "
         "the vector that it absorbs into, or does neither")
    pad, eos, bos = (0, 102, 101) if arguments["vocab"] == "bert" else (3, 1, 0)
    return ModelConfig(
        network="bert", vocab_size=arguments["vocab_size"], embed_dim=arguments["hidden_dim"],
        normalize_embeddings=False, width=bert["hidden_size"], layers=bert["num_hidden_layers"],
        time_dim=arguments["hidden_t_dim"], max_positions=bert["max_position_embeddings"],
        dropout=arguments["dropout"], input="noisy", bayes_skip=False, local_mixing=0,
        attention=AttentionConfig(heads=bert["num_attention_heads"], window=2 * bert["max_position_embeddings"]),
        moe=MoEConfig(experts=1, top_k=1, ffn=bert["intermediate_size"], gated=False, balance_weight=0, z_weight=0),
        diffusion=DiffusionConfig(
            schedule=arguments["noise_schedule"], steps=arguments["diffusion_steps"],
            time_sampling="uniform", absorbing=arguments["denoise_rate"] if absorbs else 0.0, loss="mse",
            loss_over="document", embedding_noise=True, terminal_loss=True,
            absorbing_norm=0.01 if absorbs else 0.0, conditioning="joint"),
        pad_id=pad, eos_id=eos, bos_id=bos)


def weight_map(config: ModelConfig, table: str = "live") -> dict[str, tuple[str, ...]]:
    """This model's key -> the original's keys, which are stacked along the first dimension in that order."""
    return dict(_weight_map(config, TABLES[table]))


def _weight_map(config: ModelConfig, table: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    both = ("weight", "bias")
    yield "embedding", (table,)
    yield "token_bias", ("lm_head.bias",)
    if config.diffusion.absorbing > 0:
        yield "absorbing", ("mean_embed",)
    yield "denoiser.position", ("position_embeddings.weight",)
    parts = {"denoiser.time.0": "time_embed.0", "denoiser.time.2": "time_embed.2", "denoiser.norm": "LayerNorm"}
    if config.embed_dim != config.width:
        parts |= {"denoiser.up.0": "input_up_proj.0", "denoiser.up.2": "input_up_proj.2",
                  "head.0": "output_down_proj.0", "head.2": "output_down_proj.2"}
    for index in range(config.layers):
        ours, theirs = f"denoiser.blocks.{index}", f"input_transformers.layer.{index}"
        parts |= {f"{ours}.out": f"{theirs}.attention.output.dense",
                  f"{ours}.attention_norm": f"{theirs}.attention.output.LayerNorm",
                  f"{ours}.up": f"{theirs}.intermediate.dense", f"{ours}.down": f"{theirs}.output.dense",
                  f"{ours}.output_norm": f"{theirs}.output.LayerNorm"}
        for kind in both:
            yield f"{ours}.qkv.{kind}", tuple(f"{theirs}.attention.self.{part}.{kind}"
                                              for part in ("query", "key", "value"))
    for ours, theirs in parts.items():
        for kind in both:
            yield f"{ours}.{kind}", (f"{theirs}.{kind}",)


def used(original: dict[str, Tensor], table: str) -> dict[str, Tensor]:
    """What weights are made of: all but the other embedding table and `position_ids` (0, 1, 2, …). A warning says so
    where the two tables differ."""
    live, averaged = (original.get(key) for key in TABLES.values())
    if live is not None and averaged is not None and not torch.equal(live, averaged):
        warnings.warn(f"the checkpoint's averaged and live embedding tables differ by up to "
                      f"{(live - averaged).abs().max():.3g}; the {table} one is taken", stacklevel=2)
    unused = {"position_ids", *TABLES.values()} - {TABLES[table]}
    return {key: value.detach() for key, value in original.items() if key not in unused}


def uniform_prior(config: ModelConfig) -> dict[str, Tensor]:
    """The model's buffer of unigram counts, which the original did not count."""
    return {"prior_count_V": torch.zeros(config.vocab_size, dtype=torch.int64)}


def import_weights(config: ModelConfig, original: dict[str, Tensor], table: str = "live") -> dict[str, Tensor]:
    """A state dict for `DiffusionLM(config)` from an original one, with a uniform prior. Every key of what is `used` is
    used exactly once; anything missing or left over is a ConfigError.

    table: which of TABLES the embeddings are.
    """
    wanted, original = weight_map(config, table), used(original, table)
    needed = {key for keys in wanted.values() for key in keys}
    missing, more = needed - original.keys(), original.keys() - needed
    if missing or more:
        raise ConfigError("checkpoint", "is not one of DiffuSeq's for this configuration: "
                          f"it lacks {sorted(missing) or 'nothing'} and has {sorted(more) or 'nothing'} besides")
    return {key: torch.cat([original[part] for part in parts]) for key, parts in wanted.items()} | uniform_prior(config)
