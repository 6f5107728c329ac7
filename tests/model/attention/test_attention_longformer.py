"""Equality with the Longformer attention of Hugging Face's transformers, whose pattern ours contains.

The recorded values were made with transformers 5.23.0, `LongformerSelfAttention.forward` (fp32, CPU, no dropout):
hidden states, mask, projections and outputs of one layer, with rows of different length and global tokens.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from model.attention.composed import sparse_attention
from model.attention.pattern import AttentionPattern
from model.attention.plan import build_plan
from model.batch import TokenLayout

DATA = Path(__file__).parents[2] / "data"


def attend(hidden_BND, present_BN, is_global_BN, weights, heads, window, backend):
    """Padding is dropped, and every row of the batch becomes a document. -> [tokens present, D]."""
    document_T, position_T = present_BN.nonzero().unbind(1)
    source_T = torch.zeros_like(document_T)
    layout = TokenLayout(document_T, position_T, source_T.bool(), source_T, is_global_BN[present_BN])
    pattern = AttentionPattern((window // 2, window // 2), (1,) * heads, cached=False)
    x_TD = hidden_BND[present_BN]
    q, k, v = (torch.nn.functional.linear(x_TD, weights[f"{name}.weight"], weights[f"{name}.bias"])
               .unflatten(1, (heads, -1)) for name in ("query", "key", "value"))
    plan = build_plan(layout, pattern, head_dim=q.shape[2], dtype=q.dtype, backend=backend)
    return sparse_attention(q, k, v, plan).flatten(1)


@pytest.mark.parametrize("backend", ["reference", "cpu_band"])
@pytest.mark.parametrize(("file", "window"), [("longformer_w8", 8), ("longformer_w16", 16)])
def test_recorded_values(file, window, backend):
    data = load_file(DATA / f"{file}.safetensors")
    present_BN, is_global_BN = data["padding"] == 0, data["is_global"] == 1
    for expected, globals_BN in (("output", is_global_BN), ("output_local_only", torch.zeros_like(is_global_BN))):
        found_TD = attend(data["hidden_states"], present_BN, globals_BN, data, 4, window, backend)
        torch.testing.assert_close(found_TD, data[expected][present_BN], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu_band"])
def test_live_module_with_gradients(backend):
    """Global and local projections shared, as ours are."""
    torch.manual_seed(0)
    heads, window, length, width = 4, 32, 192, 64
    theirs = LongformerSelfAttention(LongformerConfig(
        hidden_size=width, num_attention_heads=heads, attention_window=[window], attention_probs_dropout_prob=0.0,
        num_hidden_layers=1), layer_id=0)
    for name in ("query", "key", "value"):
        getattr(theirs, f"{name}_global").load_state_dict(getattr(theirs, name).state_dict())
    present_BN = torch.arange(length)[None] < torch.tensor([[length], [150], [33]])
    is_global_BN = (torch.rand(3, length) < 0.04) & present_BN
    is_global_BN[:2, 0] = True
    x_BND = torch.randn(3, length, width)
    seen_BND = x_BND.clone().requires_grad_()
    mask_BN = torch.where(present_BN, torch.where(is_global_BN, 10_000.0, 0.0), -10_000.0)
    expected_BND = theirs(seen_BND, attention_mask=mask_BN, is_index_masked=mask_BN < 0,
                          is_index_global_attn=mask_BN > 0, is_global_attn=True)[0]
    expected_TD = expected_BND[present_BN]
    dout_TD = torch.randn_like(expected_TD)
    (expected_dx,) = torch.autograd.grad(expected_TD, seen_BND, dout_TD)

    ours_BND = x_BND.clone().requires_grad_()
    found_TD = attend(ours_BND, present_BN, is_global_BN, theirs.state_dict(), heads, window, backend)
    (found_dx,) = torch.autograd.grad(found_TD, ours_BND, dout_TD)
    torch.testing.assert_close(found_TD, expected_TD, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_dx, expected_dx, atol=1e-5, rtol=1e-5)
