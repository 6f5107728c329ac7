"""A Hugging Face folder beside its weights: configuration, code, tokenizer, vocabulary and model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tools.conversion.files import Tensors
from tools.huggingface.card import model_card
from tools.huggingface.flatten import flatten
from tools.huggingface.tokenizer import write_tokenizer
from trainer.config import RunConfig, to_dict

_CODE = Path(__file__).with_name("modeling_diffusion_lm.py")
_LICENSE = Path(__file__).resolve().parents[2] / "LICENSE"
_MODEL, _CONFIG = "DiffusionLMModel", "DiffusionLMConfig"


def describe_for_huggingface(folder: Path, name: str, run: RunConfig, vocabulary: Path, tensors: Tensors, facts: dict,
                             figures: dict) -> None:
    """Writes everything but the weights, so that transformers loads the folder without this repository, and this
    repository reads it as any exported model. facts: step and weights. figures: as `figures_of` gives them."""
    dtype = str(next(dtype for dtype, *_ in tensors.values() if dtype.is_floating_point)).removeprefix("torch.")
    module = _CODE.stem
    config = {"architectures": [_MODEL], "model_type": "diffusion_lm", "dtype": dtype,
              "auto_map": {"AutoConfig": f"{module}.{_CONFIG}", "AutoModel": f"{module}.{_MODEL}"},
              "vocab_size": run.model.vocab_size, "canvas_tokens": run.data.max_target_tokens,
              "bos_token_id": run.model.bos_id, "eos_token_id": run.model.eos_id, "pad_token_id": run.model.pad_id,
              "run": to_dict(run), **facts, "figures": figures}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for file, text in flatten(_CODE).items():
        (folder / file).write_text(text)
    write_tokenizer(vocabulary, folder, run.data.longest_source())
    shutil.copyfile(vocabulary, folder / "vocabulary.model")
    shutil.copyfile(_LICENSE, folder / "LICENSE-code")
    (folder / "README.md").write_text(model_card(name, run, tensors, dtype, facts, figures))
