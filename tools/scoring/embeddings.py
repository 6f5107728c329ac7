"""Nearness of meaning, by a text encoder that the user has on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from model.errors import ConfigError


class Encoder:
    """A Hugging Face folder of an encoder; a text's vector is the mean of its tokens' last hidden states."""

    def __init__(self, folder: Path):
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise ConfigError("--embedding_model", "needs transformers: pip install transformers") from error
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError("--embedding_model", f"{folder} holds no encoder with its tokenizer: {reason}") from error

    @torch.no_grad()
    def vector(self, text: str) -> torch.Tensor:
        inputs = self.tokenizer(text, return_tensors="pt", truncation=True,
                                max_length=self.model.config.max_position_embeddings)
        return self.model(**inputs).last_hidden_state[0].mean(0)

    def similarity(self, outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Cosine of each output and the nearest of its references, times 100."""
        found = []
        for output, alternatives in zip(outputs, references, strict=True):
            vector = self.vector(output)
            found.append(100 * max(float(torch.cosine_similarity(vector, self.vector(each), dim=0))
                                   for each in alternatives))
        return found
