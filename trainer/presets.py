"""Presets (how big) and recipes (which mechanisms): named values of the run configuration.

A preset is written as a configuration file would be, and names its default recipe. A recipe is a function of
the configuration without it, because some of its values follow from sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.config import RunConfig

DEFAULT_PRESET = "tiny"

# For a demonstration in minutes on two CPU cores, with the documents that come with the repository. Two draws of many
# documents teach more in that time than four draws of half as many.
_TINY = {
    "recipe": "long_doc",
    "data": {"vocab_size": 4096, "max_source_tokens": 320, "max_target_tokens": 128, "row_tokens": 2304,
             "draws_per_source": 2},
    "model": {"embed_dim": 64, "width": 128, "layers": 3, "time_dim": 64,
              "attention": {"heads": 2, "window": 64},
              "moe": {"experts": 8, "top_k": 2, "ffn": 256}},
    "optim": {"lr": 3e-3, "warmup_steps": 40, "ema_decay": 0.99},
    "train": {"steps": 400, "log_every": 10, "eval_every": 100, "sample_every": 200, "save_every": 100},
    "eval": {"documents": 32},
    "sample": {"documents": 4},
}

# For pairs of sentences of up to 40 tokens, in minutes on two CPU cores: `make bench-e2e`. The window holds them whole.
_SHORT = {
    "recipe": "long_doc",
    "data": {"vocab_size": 800, "max_source_tokens": 64, "max_target_tokens": 40, "row_tokens": 1280},
    "model": {"embed_dim": 64, "width": 128, "layers": 3, "time_dim": 64,
              "attention": {"heads": 4, "window": 256},
              "moe": {"experts": 4, "top_k": 2, "ffn": 192}},
    "optim": {"lr": 2e-3, "warmup_steps": 50, "ema_decay": 0.99},
    "train": {"steps": 1000, "log_every": 100, "eval_every": 250, "sample_every": 0, "save_every": 0},
    "eval": {"documents": 64},
}

# The papers' shape. MoE-DiffuSeq (arXiv 2512.20604) and SA-DiffuSeq (arXiv 2512.20724) disclose 12 layers
# with sparse attention and experts in each; a window of 512 is consistent with the reach that they state.
# Width, heads, embedding width, experts, top-k and feed-forward width are not disclosed: width, heads and
# embedding follow their ancestor DiffuSeq (BERT base, 128), the active feed-forward width is BERT's 3,072,
# and the rest is our choice, as is everything about data and optimisation.
_BASE = {
    "recipe": "long_doc",
    "data": {"vocab_size": 16384, "max_source_tokens": 8192, "max_target_tokens": 256, "row_tokens": 16384,
             "draws_per_source": 8},
    "model": {"embed_dim": 128, "width": 768, "layers": 12, "time_dim": 512,
              "attention": {"heads": 12, "window": 512},
              "moe": {"experts": 8, "top_k": 2, "ffn": 1536}},
    "optim": {"lr": 3e-4, "warmup_steps": 1000, "ema_decay": 0.9999},
    "train": {"steps": 50000, "log_every": 50, "eval_every": 1000, "sample_every": 2500, "save_every": 1000,
              "keep_last": 3},
    "eval": {"documents": 128},
}

PRESETS: dict[str, dict] = {"tiny": _TINY, "base": _BASE, "short": _SHORT}


def _diffuseq(config: RunConfig) -> dict:
    """DiffuSeq (Gong et al. 2023) as its authors' code has it: their network, every token seeing every other,
    learned lengths of embeddings, 2,000 steps of Gaussian noise by the sqrt schedule, every term of their loss over
    source, target and filler, steps drawn by the second moment of their loss, rounding at every step of an ancestral
    sampler. The feed-forward is as wide as top-k experts are together. 200 sampling steps are ours, in place of
    2,000; and attention probabilities are not dropped."""
    moe = config.model.moe
    longest = replace(config.data, draws_per_source=1).longest_document()
    return {
        # Half of a window to each side reaches from one end of the longest document to the other.
        "model": {"network": "bert", "normalize_embeddings": False, "max_positions": longest, "dropout": 0.1,
                  "attention": {"window": 2 * longest, "dilation": "1", "global_tokens": "none"},
                  "moe": {"experts": 1, "top_k": 1, "ffn": moe.top_k * moe.ffn, "gated": False,
                          "balance_weight": 0.0, "z_weight": 0.0},
                  "input": "noisy", "bayes_skip": False, "local_mixing": 0,
                  "diffusion": {"schedule": "sqrt", "steps": 2000, "time_sampling": "loss_second_moment",
                                "absorbing": 0.0, "loss": "mse", "loss_over": "document", "embedding_noise": True,
                                "terminal_loss": True, "conditioning": "joint", "self_conditioning": 0.0}},
        "data": {"draws_per_source": 1},
        "sample": {"solver": "ancestral", "steps": 200, "temperature": 1.0, "clamp": True},
    }


def _moe_diffuseq(config: RunConfig) -> dict:
    """The system of MoE-DiffuSeq and SA-DiffuSeq: window, dilated and global attention, experts in every
    layer, soft absorbing state, DPM-Solver++, joint conditioning. Which heads are dilated and by how much,
    the global tokens, the schedule (DiffuSeq's), gamma (DiffuSeq-v2's 0.5), solver order and steps are not
    disclosed: ours."""
    return {
        "model": {"attention": {"dilation": "1|1,2", "global_tokens": "markers"},
                  "input": "noisy", "bayes_skip": False, "local_mixing": 0,
                  "diffusion": {"schedule": "sqrt", "time_sampling": "uniform", "absorbing": 0.5,
                                "loss": "mse", "conditioning": "joint", "self_conditioning": 0.0}},
        "data": {"draws_per_source": 1},
        "sample": {"solver": "dpmpp2m", "steps": 20, "temperature": 1.0, "clamp": False},
    }


def _long_doc(config: RunConfig) -> dict:
    """Beyond the papers: cached conditioning, cross-entropy of the prediction, the context-free posterior as
    input and as skip, local mixing, log-SNR over the range where words are decided, matched absorbing state,
    sharpened sampling. Dilation and global tokens only where documents are longer than the window reaches."""
    window = config.model.attention.window
    whole = config.data.longest_document() <= (min(window) if isinstance(window, list) else window // 2)
    return {
        "model": {"attention": {"dilation": "1" if whole else "1|1,2", "global_tokens": "none" if whole else "markers"},
                  "input": "bayes", "bayes_skip": True, "local_mixing": 5,
                  "diffusion": {"schedule": "log_snr", "time_sampling": "stratified", "absorbing": 0.5,
                                "loss": "cross_entropy", "conditioning": "cached", "self_conditioning": 0.0}},
        "sample": {"solver": "dpmpp2m_sde", "steps": 20, "temperature": 0.2, "clamp": False},
    }


RECIPES: dict[str, Callable[[RunConfig], dict]] = {
    "diffuseq": _diffuseq, "moe_diffuseq": _moe_diffuseq, "long_doc": _long_doc}
