"""Text from a model: sources in, decoded targets out, with the noise of each text fixed by its document's number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model.config import ModelConfig
from model.diffusion_lm import DiffusionLM
from model.errors import ConfigError
from model.packing import Segment, candidates_batch, generation_batch, source_segment
from model.sampling import SamplerSettings, noise_levels, sample
from trainer.data.vocabulary import Vocabulary
from trainer.mbr import choose


def generate(model: DiffusionLM, vocabulary: Vocabulary, sources: Sequence[tuple[int, np.ndarray]],
             canvas_tokens: int, settings: SamplerSettings, *, device: torch.device, candidates: int = 1,
             documents_per_batch: int = 8, between: Callable[[], None] = lambda: None) -> Iterator[dict]:
    """One record a source, in order: its `document` number, the `text`, and whether the text was `ended` by the
    model (otherwise it fills the canvas). sources: (document number, ids as `source_segment` gives them).

    candidates: of so many texts the one that minimum Bayes risk chooses; the record then holds all `candidates`.
    between: called before every step of the sampler; may raise to abandon it.
    """
    for start in range(0, len(sources), documents_per_batch):
        part = sources[start:start + documents_per_batch]
        numbers = [number for number, _ in part]
        batch = generation_batch([ids for _, ids in part], canvas_tokens=canvas_tokens, pad_id=vocabulary.pad_id,
                                 candidates=candidates, samples=numbers, share_sources=_shares_sources(model.config))
        tokens_CL = sample(model, batch, settings, device=device, between=between).tokens_CL
        texts = vocabulary.decode(tokens_CL.tolist())
        ended_C = (tokens_CL == vocabulary.eos_id).any(1).tolist()
        for number, first in zip(numbers, range(0, len(texts), candidates), strict=True):
            own = texts[first:first + candidates]
            chosen = choose(own)
            record = {"document": number, "text": own[chosen], "ended": ended_C[first + chosen]}
            yield record if candidates == 1 else {**record, "candidates": own}


def no_source(config: ModelConfig, vocabulary: Vocabulary) -> np.ndarray:
    """What `generate` is given in place of a source, for unconditional texts. ConfigError if the model never saw that.
    (A model of texts without source is given empty arrays.)"""
    if config.diffusion.source_dropout == 0:
        raise ConfigError("model.diffusion.source_dropout", "is 0: the model was never trained without a source. Train "
                          "with about 0.1")
    return source_segment([], 0, vocabulary.bos_id, vocabulary.eos_id)


@dataclass(frozen=True)
class GappedText:
    """A target with gaps: `pieces` in their order, each either ids that are given or the number of tokens of a gap.

    A gap is filled with exactly that many tokens, except where it comes last: there the text may end earlier.
    number: the key of the randomness. source: ids as `source_segment` gives them; empty for texts without source.
    """

    number: int
    source: np.ndarray
    pieces: tuple[np.ndarray | int, ...]


def infill(model: DiffusionLM, vocabulary: Vocabulary, texts: Sequence[GappedText], settings: SamplerSettings, *,
           device: torch.device, texts_per_batch: int = 8) -> Iterator[dict]:
    """One record a text, in order: its `document` number, the whole `text`, and its `fills`, one for each gap.

    ConfigError if the model was not trained for it, ValueError for a text without a gap.
    """
    if model.config.diffusion.infilling == 0:
        raise ConfigError("model.diffusion.infilling", "is 0: the model was never trained with parts of a target "
                          "given. Train with about 0.5")
    for start in range(0, len(texts), texts_per_batch):
        part = texts[start:start + texts_per_batch]
        segments = [_gapped_segment(text, vocabulary) for text in part]
        tokens_CL = sample(model, candidates_batch(segments), settings, device=device).tokens_CL.numpy()
        for text, segment, tokens_L in zip(part, segments, tokens_CL, strict=True):
            whole = segment.canvas.copy()
            whole[~segment.given] = tokens_L[:(~segment.given).sum()]
            ends = np.cumsum([piece if isinstance(piece, int) else len(piece) for piece in text.pieces])
            gaps = [whole[end - piece:end].tolist() for piece, end in zip(text.pieces, ends, strict=True)
                    if isinstance(piece, int)]
            decoded = vocabulary.decode([whole.tolist(), *gaps])
            yield {"document": text.number, "text": decoded[0], "fills": decoded[1:]}


def emergence(model: DiffusionLM, vocabulary: Vocabulary, source: tuple[int, np.ndarray], canvas_tokens: int,
              settings: SamplerSettings, *, device: torch.device) -> dict:
    """How the first candidate that `generate` gives for one source emerges: its `document` number, and for every step
    the `log_snr` and the most likely text, `texts`; the last one is the result."""
    number, ids = source
    batch = generation_batch([ids], canvas_tokens=canvas_tokens, pad_id=vocabulary.pad_id, samples=[number])
    trace: list[torch.Tensor] = []
    sample(model, batch, settings, device=device, trace=trace)
    return {"document": number, "log_snr": noise_levels(model, settings).tolist(),
            "texts": vocabulary.decode([tokens_CL[0].tolist() for tokens_CL in trace])}


def _shares_sources(config: ModelConfig) -> bool:
    return config.diffusion.conditioning == "cached"


def _gapped_segment(text: GappedText, vocabulary: Vocabulary) -> Segment:
    """The canvas with <pad> in the gaps; behind a last piece that is given stands </s>, given as well."""
    if not any(isinstance(piece, int) and piece > 0 for piece in text.pieces):
        raise ValueError(f"text {text.number} has no gap to fill")
    pieces = [*text.pieces] if isinstance(text.pieces[-1], int) else [*text.pieces, [vocabulary.eos_id]]
    canvas = [np.full(piece, vocabulary.pad_id) if isinstance(piece, int) else np.asarray(piece) for piece in pieces]
    given = [np.full(len(ids), not isinstance(piece, int)) for piece, ids in zip(pieces, canvas, strict=True)]
    return Segment(text.source, np.concatenate(canvas).astype(np.int64), 0, text.number, np.concatenate(given))
