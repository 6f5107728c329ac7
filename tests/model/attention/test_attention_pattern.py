"""The predicate by hand-counted keys, the configuration's refusals, and the policies for global tokens."""

from dataclasses import replace

import pytest
import torch

from model.attention.pattern import AttentionPattern, allowed, global_tokens, layer_patterns
from model.config import AttentionConfig, DiffusionConfig, ModelConfig
from model.errors import ConfigError
from tests.model.attention.oracle import stream


def keys_seen(documents, pattern, document, position, target, draw=0, globals_at=(), head=0):
    """{(document, position, is_target, draw)} that one token sees."""
    layout = stream(documents)
    layout = replace(layout, is_global_T=torch.isin(layout.position_T, torch.tensor(list(globals_at))))
    tokens = list(zip(*(x.tolist() for x in (layout.document_T, layout.position_T, layout.is_target_T,
                                              layout.draw_T)), strict=True))
    row = tokens.index((document, position, target, draw))
    return {tokens[i] for i in allowed(layout, pattern)[head, row].nonzero().flatten().tolist()}


def test_a_window_of_512_is_256_steps_to_each_side():
    pattern = layer_patterns(config(window=512))[0]
    assert pattern.window == (256, 256)
    seen = keys_seen([(2000, 0, 1)], pattern, 0, 1000, False)
    assert {position for _, position, _, _ in seen} == set(range(744, 1257))
    assert len(keys_seen([(2000, 0, 1)], pattern, 0, 0, False)) == 257
    assert len(keys_seen([(2000, 0, 1)], pattern, 0, 1990, False)) == 266


def test_sides_and_dilation_by_head():
    pattern = AttentionPattern((2, 1), (1, 3), False)
    assert {p for _, p, _, _ in keys_seen([(30, 0, 1)], pattern, 0, 10, False)} == {8, 9, 10, 11}
    assert {p for _, p, _, _ in keys_seen([(30, 0, 1)], pattern, 0, 10, False, head=1)} == {4, 7, 10, 13}


def test_joint_window_crosses_from_source_to_target_but_not_into_another_document():
    pattern = AttentionPattern((2, 2), (1,), False)
    seen = keys_seen([(4, 3, 1), (4, 3, 1)], pattern, 0, 5, True)
    assert seen == {(0, 3, False, 0), (0, 4, True, 0), (0, 5, True, 0), (0, 6, True, 0)}


def test_cached_targets_see_their_source_and_their_own_draw():
    pattern = AttentionPattern((1, 1), (1,), True)
    documents = [(5, 3, 2), (2, 3, 1)]
    source = {(0, p, False, 0) for p in range(5)}
    assert keys_seen(documents, pattern, 0, 5, True, draw=1) == source | {(0, 5, True, 1), (0, 6, True, 1)}
    assert keys_seen(documents, pattern, 0, 4, False) == {(0, 3, False, 0), (0, 4, False, 0)}


def test_global_tokens_keep_within_draw_and_side_when_cached():
    pattern = AttentionPattern((1, 1), (1,), True)
    documents = [(5, 4, 2)]
    source = {(0, p, False, 0) for p in range(5)}
    draw = {(0, p, True, 1) for p in range(5, 9)}
    assert keys_seen(documents, pattern, 0, 5, True, 1, globals_at=[0, 5]) == source | draw
    assert keys_seen(documents, pattern, 0, 8, True, 1, globals_at=[0, 5]) == source | draw - {(0, 6, True, 1)}
    assert keys_seen(documents, pattern, 0, 0, False, globals_at=[0, 5]) == source
    assert keys_seen(documents, pattern, 0, 4, False, globals_at=[0, 5]) == source - {(0, 1, False, 0),
                                                                                       (0, 2, False, 0)}


def config(conditioning="joint", layers=4, heads=4, **attention):
    return ModelConfig(layers=layers, attention=AttentionConfig(heads=heads, **attention),
                       diffusion=DiffusionConfig(conditioning=conditioning))


@pytest.mark.parametrize(("dilation", "expected"), [
    ("1", [(1, 1, 1, 1)] * 4),
    ("1|2", [(1,) * 4, (2,) * 4, (1,) * 4, (2,) * 4]),
    ("1|1,4", [(1,) * 4, (1, 1, 4, 4)] * 2),
    ([1, [1, 4]], [(1,) * 4, (1, 1, 4, 4)] * 2),
    ("1|2|3", [(1,) * 4, (2,) * 4, (3,) * 4, (1,) * 4]),
])
def test_dilations_by_layer_and_head(dilation, expected):
    patterns = layer_patterns(config(dilation=dilation))
    assert [pattern.dilations for pattern in patterns] == expected


def test_conditioning_and_sides_reach_the_pattern():
    assert layer_patterns(config("cached", window=[3, 0]))[0] == AttentionPattern((3, 0), (1,) * 4, True)


@pytest.mark.parametrize(("key", "value", "says"), [
    ("window", 7, "even"), ("window", 0, "even"), ("window", -2, "even"), ("window", [0, 0], "left, right"),
    ("window", [-1, 2], "left, right"), ("window", [1, 2, 3], "left, right"), ("window", True, "even"),
    ("dilation", "0", "at least 1"), ("dilation", "1|-2", "at least 1"), ("dilation", "1,2,3", "heads = 4"),
    ("dilation", "1,", "whole number"), ("dilation", "", "whole number"), ("dilation", [], "no layer"),
    ("dilation", [[]], "at least 1"), ("dilation", [1.5], "whole number"),
    ("global_tokens", "first", "none of"), ("global_tokens", "prefix", "incomplete"),
    ("global_tokens", "prefix:0", "makes no token"), ("global_tokens", "markers:3", "cannot take"),
    ("global_tokens", "positions:1,x", "whole number"), ("global_tokens", "none+markers", "leave none out"),
    ("global_tokens", "positions:-1", "negative"),
    ("global_tokens", "positions:" + ",".join(map(str, range(65))), "at most 64"),
])
def test_impossible_values_are_refused_by_key(key, value, says):
    with pytest.raises(ConfigError, match=says) as error:
        layer_patterns(config(**{key: value}))
    assert error.value.key == f"model.attention.{key}"


@pytest.mark.parametrize(("policy", "expected"), [
    ("none", []),
    ("prefix:2", [0, 1, 10, 11]),
    ("separators", [3]),  # not where targets end: that would tell the model how long they are
    ("markers", [0, 4, 7, 10]),
    ("positions:1,4", [1, 4, 7, 11]),
    ("positions:2+markers", [0, 2, 4, 7, 10, 12]),
])
@pytest.mark.parametrize("shuffled", [False, True])
def test_global_token_policies(policy, expected, shuffled):
    layout = stream([(4, 3, 2), (0, 3, 1)])  # rows 0-3 a source, 4-6 and 7-9 its draws, 10-12 a target alone
    tokens_T = torch.tensor([5, 5, 5, 2, 5, 5, 2, 5, 5, 2, 5, 5, 2])
    order_T = torch.randperm(13, generator=torch.Generator().manual_seed(0)) if shuffled else torch.arange(13)
    found_T = global_tokens(policy, tokens_T=tokens_T[order_T], document_T=layout.document_T[order_T],
                            position_T=layout.position_T[order_T], is_target_T=layout.is_target_T[order_T],
                            draw_T=layout.draw_T[order_T], eos_id=2)
    assert found_T.dtype == torch.bool
    assert sorted(order_T[found_T].tolist()) == expected
