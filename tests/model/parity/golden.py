"""What the original DiffuSeq computed (tests/data/diffuseq/index.json says how), and its models as ours."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.batch import PackedBatch
from model.config import ModelConfig
from model.diffuseq_import import import_weights, original_config
from model.diffusion.discrete import DiscreteProcess, betas
from model.diffusion_lm import DiffusionLM
from model.packing import Segment, pack

FOLDER = Path(__file__).parents[2] / "data" / "diffuseq"
CASES = {case["name"]: case for case in json.loads((FOLDER / "index.json").read_text())["cases"]}
PADDING = 3


def load(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / CASES[name]["file"])


def reference_attention(config: ModelConfig) -> ModelConfig:
    """The originals are too narrow for the other backends."""
    return replace(config, attention=replace(config.attention, backend="reference"))


def network(name: str, **arguments) -> DiffusionLM:
    """The model whose weights are the case `name`; arguments as in the original's training_args.json."""
    params = CASES[name]["params"]
    described = {"vocab_size": params["vocab_size"], "hidden_dim": params["input_dims"], "vocab": "vocab.txt",
                 "hidden_t_dim": params["hidden_t_dim"], "dropout": 0.0, "noise_schedule": "sqrt",
                 "diffusion_steps": params["T"], **arguments}
    model = DiffusionLM(reference_attention(original_config(described, params["bert_config"])))
    model.load_state_dict(import_weights(model.config, load(name)))
    return model


V2 = {"learned_mean_embed": True, "denoise": True, "denoise_rate": 0.5}


def packed(ids_BL: Tensor, mask_BL: Tensor) -> PackedBatch:
    """The original's rectangular batch as a packed one: a document a row, targets from the first 1 of the mask on."""
    segments = []
    for sample, (ids_L, mask_L) in enumerate(zip(ids_BL, mask_BL, strict=True)):
        target_L = mask_L == 1
        canvas = ids_L[target_L].numpy()
        segments.append(Segment(ids_L[~target_L].numpy(), canvas, int((canvas != PADDING).sum()), sample))
    rows = len(segments)
    return pack(segments, np.arange(rows), rows, np.arange(rows)[:, None], rows)


def process(steps: int) -> DiscreteProcess:
    return DiscreteProcess(betas("sqrt", steps))


def analytic_denoiser(table_VE: Tensor, alpha_bar: Tensor, tau: float,
                      kappa: float) -> Callable[[Tensor, float], Tensor]:
    """The denoiser of the samplers' cases: the posterior mean over the rows of a table, with the positions [B, L, E]
    mixed, and smoothed by tau (tau = 0: exact)."""
    log_alpha = 0.5 * alpha_bar.log()

    def predict(x_BLE: Tensor, step: float) -> Tensor:
        step = min(round(step) if abs(step - round(step)) < 0.01 else step, len(log_alpha) - 1)
        below = min(int(step), len(log_alpha) - 2)
        alpha = torch.lerp(log_alpha[below], log_alpha[below + 1], step - below).exp().item()
        mixed = (1 - kappa) * x_BLE + kappa * x_BLE.mean(1, keepdim=True)
        fit = alpha * mixed @ table_VE.T - 0.5 * alpha ** 2 * table_VE.square().sum(-1)
        return (fit / (1 - alpha ** 2 + tau ** 2 * alpha ** 2)).softmax(-1) @ table_VE

    return predict
