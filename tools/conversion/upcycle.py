"""Dense models as the start of mixtures of experts (sparse upcycling, arXiv 2212.05055): every expert a copy of the
dense feed-forward, so that the function is at first the same."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from model.errors import ConfigError
from model.keyed_random import keyed_generator
from tools.conversion.mapping import Rule
from tools.conversion.source import Source
from trainer.config import RunConfig

_ROUTER_STD = 0.02  # of a new router's weights, as in training from scratch
_TIE_STD = 1e-6  # of the logits of a router for one expert a token: enough to break ties, too little to be seen
_ROUTER, _NOISE = -1, -2  # in the place where experts have their number


def upcycled_run(run: RunConfig, experts: int, top_k: int) -> RunConfig:
    """The configuration of the mixture. With one expert a token, its weight is the router's probability itself, so
    that the router learns; otherwise the chosen experts' weights sum to 1."""
    moe = run.model.moe
    if run.model.network == "bert":
        raise ConfigError("--upcycle", "needs a network with experts, but this is model.network = bert")
    if moe.experts != 1:
        raise ConfigError("--upcycle", f"needs a dense model, model.moe.experts = 1; this one has {moe.experts}")
    run = replace(run, model=replace(run.model, moe=replace(moe, experts=experts, top_k=top_k, normalize=top_k > 1)))
    run.validate()
    return run


def upcycling(source: Source, run: RunConfig, noise: float, seed: int) -> list[Rule]:
    """Rules from the dense model to the mixture `run`. noise: standard deviation of what is added to every copy, as a
    share of that of its weights. seed: of the routers and of the noise."""
    experts, top_k = run.model.moe.experts, run.model.moe.top_k
    rules = []
    for number, name in enumerate(source.shapes):
        last = name.rpartition(".")[2]
        if name.endswith("moe.router.weight"):
            rules.append(Rule(name, (name,), _Router(number, experts, top_k, seed)))
        elif ".moe.experts." in name:
            # Where a token's output is weighted by about 1 / experts, the output matrix makes up for it.
            scale = experts if last == "w2" and top_k == 1 else 1
            rules.append(Rule(name, (name,), _Copies(number, experts, scale, noise, seed)))
        else:
            rules.append(Rule(name, (name,)))
    return rules


class _Router:
    """[1, D] -> [E, D]: the dense model's router, which had nothing to decide, gives its shape."""

    def __init__(self, number: int, experts: int, top_k: int, seed: int):
        self.number, self.experts, self.top_k, self.seed = number, experts, top_k, seed

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        width = tensors[0].shape[1]
        std = _TIE_STD / width ** 0.5 if self.top_k == 1 else _ROUTER_STD
        return torch.randn(self.experts, width, generator=keyed_generator(self.seed, self.number, _ROUTER)) * std


class _Copies:
    """[1, F, D] -> [E, F, D]."""

    def __init__(self, number: int, experts: int, scale: float, noise: float, seed: int):
        self.number, self.experts, self.scale, self.noise, self.seed = number, experts, scale, noise, seed

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        copies_EFD = tensors[0].float().repeat(self.experts, 1, 1)
        if self.noise > 0:
            generator = keyed_generator(self.seed, self.number, _NOISE)
            copies_EFD += torch.randn(copies_EFD.shape, generator=generator) * (self.noise * tensors[0].float().std())
        return copies_EFD * self.scale
