"""Documents become samples: a source and a canvas for the target, cut to what a row can hold."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from model.errors import ConfigError
from model.packing import Segment, counting, source_segment
from trainer.data.mixture import Part
from trainer.data.token_cache import TokenCache
from trainer.errors import DataError


class Samples:
    """The S samples of a corpus, cut to their greatest lengths.

    A document with source and target is one sample:
        source: <bos>, source tokens, </s>; at most `max_source_tokens` (0: no limit of its own)
        canvas: target tokens, </s>, then <pad> up to `max_target_tokens`; a longer target is cut and has no
        </s>
    A text without source is cut into chunks of `max_target_tokens`, each a sample with no source at all; the
    last one ends with </s> and <pad>, unless the text fills it to the end. Empty texts are left out.

    A sample takes tokens_S = source_tokens_S + draws * max_target_tokens tokens of a row; where that exceeds
    `row_tokens`, its source is cut further. ConfigError if not even the canvases fit.

    Arrays over samples: document_S (index in the cache), start_S (first target token), source_tokens_S,
    loss_tokens_S (text and </s>), tokens_S. `parts` are the corpora: their names, samples and weights.
    """

    def __init__(self, cache: TokenCache, *, max_source_tokens: int, max_target_tokens: int, row_tokens: int,
                 draws: int = 1, weights: Mapping[str, float] | None = None):
        self.cache, self.draws = cache, draws
        self.row_tokens, self.canvas_tokens = row_tokens, max_target_tokens
        room = row_tokens - draws * max_target_tokens
        paired_N, lengths_N = cache.paired_N, cache.target_lengths_N
        if room < (3 if paired_N.any() else 0):
            raise ConfigError("data.row_tokens", f"{row_tokens} tokens cannot hold data.draws_per_source x "
                              f"data.max_target_tokens = {draws} x {max_target_tokens} tokens"
                              f"{' and a source' if paired_N.any() else ''}: raise it or lower the others")
        wanted_N = np.where(paired_N, cache.source_lengths_N + 2, 0)
        limited_N = np.minimum(wanted_N, max_source_tokens) if max_source_tokens else wanted_N
        fitting_N = np.minimum(limited_N, room)
        self.sources_cut = int((limited_N < wanted_N).sum())
        self.sources_cut_to_row = int((fitting_N < limited_N).sum())
        self.targets_cut = int(((lengths_N + 1 > max_target_tokens) & paired_N).sum())
        chunks_N = np.where(paired_N, 1, -(-lengths_N // max_target_tokens))
        self.document_S = np.repeat(np.arange(len(cache)), chunks_N)
        self.start_S = counting(chunks_N) * max_target_tokens
        self.source_tokens_S = fitting_N[self.document_S]
        text_S = np.minimum(lengths_N[self.document_S] - self.start_S, max_target_tokens)
        self.loss_tokens_S = text_S + (text_S < max_target_tokens)
        self.tokens_S = self.source_tokens_S + draws * max_target_tokens
        bounds = np.searchsorted(self.document_S, cache.bounds).tolist()
        weights = weights or {str(folder): 1.0 for folder in cache.folders}
        self.parts = [Part(name, low, high, weight)
                      for (name, weight), (low, high) in zip(weights.items(), pairwise(bounds), strict=True)]
        if not len(self):
            raise DataError(f"{cache.name}: the corpus has no text to train on")

    def __len__(self) -> int:
        return len(self.document_S)

    def source(self, sample: int) -> np.ndarray:
        """<bos> tokens </s> of a sample, int64; empty for texts without source."""
        length = int(self.source_tokens_S[sample])
        if not length:
            return np.empty(0, np.int64)
        return source_segment(self.cache.source(self.document_S[sample], 0, length - 2), length,
                              self.cache.bos_id, self.cache.eos_id)

    def canvas(self, sample: int) -> np.ndarray:
        """Target tokens, </s>, <pad> of a sample, int64 [max_target_tokens]."""
        start = int(self.start_S[sample])
        text = self.cache.target(self.document_S[sample], start, start + self.canvas_tokens)
        canvas = np.full(self.canvas_tokens, self.cache.pad_id, np.int64)
        canvas[:len(text)] = text
        canvas[len(text):len(text) + 1] = self.cache.eos_id
        return canvas

    def segment(self, sample: int, source_of: int | None = None) -> Segment:
        """A sample with its own source or with that of another."""
        return Segment(self.source(sample if source_of is None else source_of), self.canvas(sample),
                       int(self.loss_tokens_S[sample]), int(sample))

    def canvas_counts(self, most: int = 20_000) -> np.ndarray:
        """How often each token stands on a canvas, <pad> included [V], from at most `most` samples spread
        evenly."""
        counts = np.zeros(self.cache.vocab_size, np.int64)
        chosen = np.arange(min(most, len(self))) * len(self) // min(most, len(self))
        for part in np.array_split(chosen, -(-len(chosen) // 256)):
            counts += np.bincount(np.concatenate([self.canvas(sample) for sample in part]), minlength=len(counts))
        return counts

    def describe(self) -> str:
        """One line on size and on what was cut; where there are several corpora, one more on each."""
        share = len(self) / 100
        lines = [f"{len(self.cache):,} documents, {len(self):,} samples, {self.source_tokens_S.sum():,} "
                 f"source and {self.loss_tokens_S.sum():,} target tokens; cut: "
                 f"{self.sources_cut / share:.1f} % of sources to their limit, "
                 f"{self.sources_cut_to_row / share:.1f} % to the row, "
                 f"{self.targets_cut / share:.1f} % of targets"]
        if len(self.parts) > 1:
            tokens = [self.tokens_S[part.low:part.high].mean() * part.samples_per_epoch if len(part) else 0
                      for part in self.parts]
            samples = sum(part.samples_per_epoch for part in self.parts)
            lines += [f"  {part.name}: {part.samples_per_epoch:,} of an epoch's {samples:,} samples "
                      f"({part.weight:g} x {len(part):,}), {count / sum(tokens):.1%} of its tokens"
                      for part, count in zip(self.parts, tokens, strict=True)]
        return "\n".join(lines)
