"""Nearness of meaning, by a text encoder that the user has on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from model.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NO_LIMIT = 1_000_000
"""From here on a tokenizer's limit says that it knows of none."""


class Encoder:
    """A Hugging Face folder of an encoder, or of a model that has one. A text's vector is the mean of its tokens' last
    hidden states, of the first `longest` tokens where it has more."""

    def __init__(self, folder: Path):
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise ConfigError("--embedding_model", "needs transformers: pip install transformers") from error
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError("--embedding_model", f"{folder} holds no encoder with its tokenizer: {reason}") from error
        self.model = model.get_encoder() if model.config.is_encoder_decoder else model
        self.longest = longest_input(self.tokenizer, self.model)

    @torch.no_grad()
    def vector(self, text: str) -> torch.Tensor:
        inputs = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=self.longest)
        return self.model(**inputs).last_hidden_state[0].mean(0)

    def similarity(self, outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Cosine of each output and the nearest of its references, times 100."""
        found = []
        for output, alternatives in zip(outputs, references, strict=True):
            vector = self.vector(output)
            found.append(100 * max(float(torch.cosine_similarity(vector, self.vector(each), dim=0))
                                   for each in alternatives))
        return found


def longest_input(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """Most tokens of a text that an encoder takes, special ones included; 512 where neither of the two says."""
    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < _NO_LIMIT else []
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    if positions > 0:
        table = next((part for name, part in model.named_modules() if name.endswith("position_embeddings")), None)
        padding = getattr(table, "padding_idx", None)  # RoBERTa and its kin number positions from the one after it
        limits.append(positions if padding is None else positions - padding - 1)
    return min(limits, default=512)
