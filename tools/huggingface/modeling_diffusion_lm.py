"""A diffusion language model for transformers: what AutoModel loads from a Hugging Face folder.

    model = AutoModel.from_pretrained(DIR, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)
    model.write(["A long document."], tokenizer)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from model.batch import PackedBatch
from model.config import AttentionConfig, DiffusionConfig, ModelConfig, MoEConfig
from model.diffusion_lm import DiffusionLM
from model.packing import generation_batch
from model.sampling import SamplerSettings, sample, token_logits


class DiffusionLMConfig(PreTrainedConfig):
    """run: the whole configuration of the run that made the model, of which its `model`, `sample` and `data` are used
    here. canvas_tokens: length of a target, its end included."""

    model_type = "diffusion_lm"

    def network(self) -> ModelConfig:
        """The model's shape and mechanism."""
        parts = {"attention": AttentionConfig, "moe": MoEConfig, "diffusion": DiffusionConfig}
        values = self.run["model"]
        return ModelConfig(**values | {name: part(**values[name]) for name, part in parts.items()})

    def sampling(self, **changes: object) -> SamplerSettings:
        """How the run generates, with `changes` to fields of SamplerSettings."""
        usual = {field.name: self.run["sample"][field.name] for field in fields(SamplerSettings)}
        return SamplerSettings(**usual | changes)


@dataclass
class Prediction(ModelOutput):
    """logits: [C, L, V], of every token of C canvases."""

    logits: Tensor | None = None


class DiffusionLMModel(PreTrainedModel):
    """Writes a target for each source by denoising; `network` is the model itself."""

    config_class = DiffusionLMConfig
    base_model_prefix = "network"
    main_input_name = "noisy_CLE"

    def __init__(self, config: DiffusionLMConfig):
        super().__init__(config)
        self.network = DiffusionLM(config.network())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.network:
            module.init_weights(self.config.run["train"]["seed"])

    def forward(self, noisy_CLE: Tensor, log_snr: float, sources: Sequence[np.ndarray],
                absorbed_CL: Tensor | None = None, guess_CLE: Tensor | None = None) -> Prediction:
        """One denoising: what each token of C canvases was before it was noised.

        noisy_CLE: noisy embeddings in the shifted coordinates (the absorbing vector is the origin), at the noise level
        log_snr = log(alpha^2 / sigma^2). sources: C arrays of ids, <bos> … </s>; empty ones for models of texts without
        source. absorbed_CL: tokens in the absorbing state. guess_CLE: the estimate of the step before, for models with
        self-conditioning; zeros for none.
        """
        copies, length, _ = noisy_CLE.shape
        batch = self._batch(sources, range(copies), length)
        z_NE = noisy_CLE.flatten(0, 1)
        absorbed_N = torch.zeros_like(z_NE[:, 0], dtype=torch.bool) if absorbed_CL is None else absorbed_CL.flatten()
        guess_NE = torch.zeros_like(z_NE) if guess_CLE is None else guess_CLE.flatten(0, 1)
        level = torch.tensor(log_snr, dtype=torch.float32, device=z_NE.device)
        return Prediction(token_logits(self.network, batch, z_NE, absorbed_N, level, guess_NE)
                          .unflatten(0, (copies, length)))

    def draw(self, sources: Sequence[np.ndarray], numbers: Sequence[int] | None = None, **sampling: object) -> Tensor:
        """Token ids [C, L] of a target for each of C sources, on the CPU; </s> and what stands behind it included.

        sources: as in `forward`. numbers: what the noise of each is keyed by besides the seed; by default 0, 1, …
        sampling: fields of SamplerSettings (solver, steps, grid, temperature, end_temperature, guidance, clamp, seed)
        in place of what the run generates with.
        """
        numbers = range(len(sources)) if numbers is None else numbers
        batch = self._batch(sources, numbers, self.config.canvas_tokens)
        return sample(self.network, batch, self.config.sampling(**sampling), device=self.device).tokens_CL

    def write(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, texts_per_batch: int = 8,
              **sampling: object) -> list[str]:
        """A target for each source text, which is cut to the tokenizer's `model_max_length`. What is written depends
        on the text, its place in `texts` and the seed. sampling: as in `draw`."""
        sources = [np.array(ids, np.int64) for ids in tokenizer(list(texts), truncation=True)["input_ids"]]
        written = []
        for start in range(0, len(sources), texts_per_batch):
            part = sources[start:start + texts_per_batch]
            tokens_CL = self.draw(part, range(start, start + len(part)), **sampling)
            ended_CL = (tokens_CL == self.config.eos_token_id).cumsum(1) > 0
            tokens_CL = tokens_CL.masked_fill(ended_CL, self.config.pad_token_id)
            written += tokenizer.batch_decode(tokens_CL, skip_special_tokens=True)
        return written

    def _batch(self, sources: Sequence[np.ndarray], numbers: Sequence[int], length: int) -> PackedBatch:
        return generation_batch(sources, canvas_tokens=length, pad_id=self.config.pad_token_id, samples=numbers)
