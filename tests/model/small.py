"""A small model and hand-made packed batches for tests."""

import numpy as np
import torch

from model.batch import PackedBatch
from model.config import AttentionConfig, DiffusionConfig, ModelConfig, MoEConfig
from model.diffusion_lm import DiffusionLM
from model.packing import Segment, pack

VOCABULARY = 40
CANVAS = 12


def small_config(**diffusion) -> ModelConfig:
    """Every mechanism on, in a size that a test can afford."""
    return ModelConfig(
        vocab_size=VOCABULARY, embed_dim=16, width=32, layers=2, time_dim=16, local_mixing=3,
        attention=AttentionConfig(heads=2, window=8, dilation="1|1,2", global_tokens="markers"),
        moe=MoEConfig(experts=4, top_k=2, ffn=24),
        diffusion=DiffusionConfig(**diffusion))


def small_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> DiffusionLM:
    """Initialised, with a head and modulations that are not zero, as after some training."""
    model = DiffusionLM(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.prior_count_V.copy_(torch.arange(config.vocab_size) * 7 % 23)
    return model.to(dtype)


def batch_of(samples: list[int], draws: int = 1, source_tokens: tuple[int, ...] = (9, 17, 5, 30)) -> PackedBatch:
    """One row a document. The content of a document depends on its number alone."""
    segments = []
    for sample in samples:
        rng = np.random.default_rng(sample)
        source = rng.integers(4, VOCABULARY, source_tokens[sample % len(source_tokens)])
        length = 4 + sample % (CANVAS - 4)
        canvas = np.full(CANVAS, 3)
        canvas[:length] = rng.integers(4, VOCABULARY, length)
        canvas[length] = 2
        segments.append(Segment(source, canvas, length + 1, sample))
    strata = len(samples) * draws
    return pack(segments, np.arange(len(samples)), len(samples), np.arange(strata).reshape(len(samples), draws), strata)
