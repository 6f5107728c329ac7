"""Text from a model: sources in, decoded targets out, with the noise of each document fixed by its number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

import numpy as np
import torch

from model.diffusion_lm import DiffusionLM
from model.sampling import SamplerSettings, noise_levels, sample
from trainer.config import SampleConfig
from trainer.data.evaluation import generation_batch
from trainer.data.vocabulary import Vocabulary


def sampler_settings(config: SampleConfig) -> SamplerSettings:
    """The way of generating that a run's configuration asks for."""
    return SamplerSettings(**{field.name: getattr(config, field.name) for field in fields(SamplerSettings)})


def generate(model: DiffusionLM, vocabulary: Vocabulary, sources: Sequence[tuple[int, np.ndarray]],
             canvas_tokens: int, settings: SamplerSettings, *, device: torch.device,
             documents_per_batch: int = 8, between: Callable[[], None] = lambda: None) -> Iterator[dict]:
    """One record a source, in order: its `document` number, the `text`, and whether the text was `ended` by the
    model (otherwise it fills the canvas). sources: (document number, ids as `source_segment` gives them). between:
    called before every step of the sampler; may raise to abandon it."""
    for start in range(0, len(sources), documents_per_batch):
        part = sources[start:start + documents_per_batch]
        numbers = [number for number, _ in part]
        batch = generation_batch([ids for _, ids in part], canvas_tokens=canvas_tokens, pad_id=vocabulary.pad_id,
                                 samples=numbers)
        tokens_CL = sample(model, batch, settings, device=device, between=between).tokens_CL
        texts = vocabulary.decode(tokens_CL.tolist())
        for number, tokens_L, text in zip(numbers, tokens_CL, texts, strict=True):
            yield {"document": number, "text": text, "ended": bool((tokens_L == vocabulary.eos_id).any())}


def emergence(model: DiffusionLM, vocabulary: Vocabulary, source: tuple[int, np.ndarray], canvas_tokens: int,
              settings: SamplerSettings, *, device: torch.device) -> dict:
    """How the text that `generate` gives for one source emerges: its `document` number, and for every step the
    `log_snr` and the most likely text, `texts`; the last one is the result."""
    number, ids = source
    batch = generation_batch([ids], canvas_tokens=canvas_tokens, pad_id=vocabulary.pad_id, samples=[number])
    trace: list[torch.Tensor] = []
    sample(model, batch, settings, device=device, trace=trace)
    return {"document": number, "log_snr": noise_levels(model, settings).tolist(),
            "texts": vocabulary.decode([tokens_CL[0].tolist() for tokens_CL in trace])}
