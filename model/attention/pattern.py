"""Who may see whom: the one definition of the attention pattern, its configuration and its dense oracle.

For query i and key j (Beltagy et al. 2020 for the window and the global tokens):

    allowed(i, j) = same_document(i, j)
                and (draw(i) == draw(j) or is_source(j))            noised copies of a target do not see each other
                and not (cached and is_source(i) and is_target(j))  a source never sees a target in cached mode
                and ( window(i, j)                                  j - i = k * dilation with -left <= k <= right
                      or is_global(i) or is_global(j)
                      or (cached and is_target(i) and is_source(j)) )
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import TokenLayout
from model.config import ModelConfig
from model.errors import ConfigError

MAX_SCATTERED_GLOBALS = 64
"""Global tokens of a document (or of one noised copy) that are not a prefix of it; each costs every query a key."""


@dataclass(frozen=True)
class AttentionPattern:
    """window: (left, right) keys on each side, in steps of the dilation. dilations: the step of each head.
    cached: sources do not see targets, and targets see their whole source."""

    window: tuple[int, int]
    dilations: tuple[int, ...]
    cached: bool


def layer_patterns(config: ModelConfig) -> list[AttentionPattern]:
    """The pattern of each layer. ConfigError names the key of `model.attention` that cannot work."""
    attention = config.attention
    parse_global_tokens(attention.global_tokens)
    window = _parse_window(attention.window)
    layers = _parse_dilations(attention.dilation, attention.heads)
    cached = config.diffusion.conditioning == "cached"
    return [AttentionPattern(window, layers[i % len(layers)], cached) for i in range(config.layers)]


def allowed(layout: TokenLayout, pattern: AttentionPattern) -> Tensor:
    """The dense oracle: bool [H, T, T], True where a query (second index) sees a key (third). O(T^2) memory."""
    document_T, draw_T, target_T = layout.document_T, layout.draw_T, layout.is_target_T
    distance_TT = layout.position_T[None, :] - layout.position_T[:, None]
    left, right = pattern.window
    dilation_H11 = torch.tensor(pattern.dilations, device=document_T.device)[:, None, None]
    seen_HTT = ((distance_TT % dilation_H11 == 0) & (distance_TT >= -left * dilation_H11)
                & (distance_TT <= right * dilation_H11))
    seen_HTT = seen_HTT | layout.is_global_T[:, None] | layout.is_global_T[None, :]
    visible_TT = ((document_T[:, None] == document_T[None, :])
                  & ((draw_T[:, None] == draw_T[None, :]) | ~target_T[None, :]))
    if pattern.cached:
        seen_HTT = seen_HTT | (target_T[:, None] & ~target_T[None, :])
        visible_TT = visible_TT & (target_T[:, None] | ~target_T[None, :])
    return seen_HTT & visible_TT


def global_tokens(policy: str, *, tokens_T: Tensor, document_T: Tensor, position_T: Tensor, is_target_T: Tensor,
                  draw_T: Tensor, eos_id: int) -> Tensor:
    """Bool [T]: the tokens that `AttentionConfig.global_tokens` makes global.

    Separators are the `eos_id` tokens of sources; where a target ends is for the model to find out. Markers are the
    tokens of lowest position in each source and in each draw of a target.
    """
    is_global_T = torch.zeros_like(is_target_T)
    for name, numbers in parse_global_tokens(policy):
        if name == "prefix":
            is_global_T |= position_T < numbers[0]
        elif name == "separators":
            is_global_T |= (tokens_T == eos_id) & ~is_target_T
        elif name == "positions":
            is_global_T |= torch.isin(position_T, torch.tensor(numbers, device=position_T.device))
        elif name == "markers":
            owner_T3 = torch.stack([document_T, is_target_T.long(), draw_T * is_target_T], dim=1)
            owners, owner_T = torch.unique(owner_T3, dim=0, return_inverse=True)
            first_O = position_T.new_full((len(owners),), torch.iinfo(position_T.dtype).max)
            first_O.scatter_reduce_(0, owner_T, position_T, "amin")
            is_global_T |= position_T == first_O[owner_T]
    return is_global_T


def parse_global_tokens(policy: str) -> list[tuple[str, list[int]]]:
    """`prefix:4+separators` -> [("prefix", [4]), ("separators", [])]. ConfigError where it means nothing."""
    key, choices = "model.attention.global_tokens", "none, prefix:k, separators, markers, positions:0,5,9"
    rules = []
    for term in policy.split("+"):
        name, colon, text = term.strip().partition(":")
        numbers = [_integer(key, number) for number in text.split(",")] if colon else []
        if name not in ("none", "prefix", "separators", "markers", "positions"):
            raise ConfigError(key, f"'{term}' is none of {choices} (joined by +)")
        if name == "none" and policy.strip() != "none":
            raise ConfigError(key, f"'{policy}' joins none with something else: leave none out")
        if bool(colon) != (name in ("prefix", "positions")) or (name == "prefix" and len(numbers) != 1):
            raise ConfigError(key, f"'{term}' is incomplete or has a value it cannot take: write one of {choices}")
        if name == "prefix" and numbers[0] < 1:
            raise ConfigError(key, f"'{term}' makes no token global: write prefix:1 or more, or none")
        if any(number < 0 for number in numbers):
            raise ConfigError(key, f"'{term}' has a negative position: positions count from 0")
        if len(set(numbers)) > MAX_SCATTERED_GLOBALS:
            raise ConfigError(key, f"{len(set(numbers))} explicit positions; at most {MAX_SCATTERED_GLOBALS} "
                                   "are allowed: use prefix:k, whose length is free")
        if name != "none":
            rules.append((name, numbers))
    return rules


def _parse_window(window: int | list[int]) -> tuple[int, int]:
    key = "model.attention.window"
    if isinstance(window, list | tuple):
        if len(window) != 2 or any(not isinstance(side, int) or side < 0 for side in window) or sum(window) == 0:
            raise ConfigError(key, f"{list(window)} must be [left, right], two counts of keys of which one is positive")
        return window[0], window[1]
    if not isinstance(window, int) or window <= 0 or window % 2:
        raise ConfigError(key, f"must be a positive even number (half of it to each side) or [left, right], "
                               f"not {window!r}")
    return window // 2, window // 2


def _parse_dilations(dilation: str | list, heads: int) -> list[tuple[int, ...]]:
    key = "model.attention.dilation"
    layers = dilation if isinstance(dilation, list) else [layer.split(",") for layer in str(dilation).split("|")]
    if not layers:
        raise ConfigError(key, "has no layer: write \"1\" for a plain window")
    parsed = []
    for layer in layers:
        steps = [_integer(key, step) for step in (layer if isinstance(layer, list) else [layer])]
        if not steps or min(steps) < 1:
            raise ConfigError(key, f"{dilation!r} has a step below 1: every value must be at least 1")
        if heads % len(steps):
            raise ConfigError(key, f"{len(steps)} values in {layer!r} cannot share model.attention.heads = {heads} "
                                   "equally: use a number of values that divides it")
        parsed.append(tuple(step for step in steps for _ in range(heads // len(steps))))
    return parsed


def _integer(key: str, value: str | int) -> int:
    try:
        if not isinstance(value, bool | float):
            return int(value)
    except (TypeError, ValueError):
        pass
    raise ConfigError(key, f"{value!r} is not a whole number")
