"""The GPU adapters on the CPU: their kernels are replaced by emulations with the same signatures and conventions."""

import importlib.machinery
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor

from model.attention.composed import sparse_attention
from model.attention.plan import build_plan
from tests.model.attention.oracle import dense_outputs, outputs, random_case, worst


def bands(cu_q: Tensor, cu_k: Tensor, left: int, right: int):
    """(queries, keys, mask) of each segment, windows aligned at the last key as in FlashAttention-2."""
    for i in range(len(cu_q) - 1):
        rows, keys = slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))
        queries, count = rows.stop - rows.start, keys.stop - keys.start
        distance = torch.arange(count)[None, :] - torch.arange(queries)[:, None] - (count - queries)
        mask = torch.ones(queries, count, dtype=torch.bool)
        if left >= 0:
            mask &= distance >= -left
        if right >= 0:
            mask &= distance <= right
        yield rows, keys, mask


def emulated_forward(q, k, v, cu_q, cu_k, scale, left, right):
    """out, lse [H, Q]; as the kernels do, rows without a key give out 0 and lse +inf."""
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], q.shape[0]), torch.inf, dtype=q.dtype)
    for rows, keys, mask in bands(cu_q, cu_k, left, right):
        score = (torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * scale).masked_fill(~mask, -torch.inf)
        lse[:, rows] = score.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", score.softmax(-1), v[keys])
    return out, lse


def emulated_backward(dout, q, k, v, out, lse, cu_q, cu_k, scale, left, right):
    assert all(x.is_contiguous() for x in (dout, out, lse))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys, mask in bands(cu_q, cu_k, left, right):
        score = (torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * scale).masked_fill(~mask, -torch.inf)
        weight = (score - lse[:, rows, None]).exp()
        dweight = torch.einsum("qhd,khd->hqk", dout[rows], v[keys]) - (dout[rows] * out[rows]).sum(-1).T[..., None]
        dv[keys] = torch.einsum("hqk,qhd->khd", weight, dout[rows])
        dq[rows] = torch.einsum("hqk,khd->qhd", weight * dweight * scale, k[keys])
        dk[keys] = torch.einsum("hqk,qhd->khd", weight * dweight * scale, q[rows])
    return dq, dk, dv


@pytest.fixture
def torch_flash():
    """The private operations of PyTorch, with emulations as their CPU kernels."""
    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None, window_size_left=None,
                window_size_right=None, **unused):
        assert (dropout, causal, debug) == (0.0, False, False) and not any(unused.values())
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        empty = q.new_empty(0)
        return *emulated_forward(q, k, v, cu_q, cu_k, scale, window_size_left, window_size_right), empty, empty, empty

    def backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng_state, unused, *, scale=None,
                 window_size_left=None, window_size_right=None):
        assert (dropout, causal) == (0.0, False)
        return emulated_backward(dout, q, k, v, out, lse, cu_q, cu_k, scale, window_size_left, window_size_right)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield "torch_flash"
    library._destroy()


@pytest.fixture
def flash_attn(monkeypatch):
    """A package of that name with the two functions of flash-attn 2.8.3.post2, arguments in its order."""
    def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
                window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
                block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False):
        assert (dropout_p, causal, softcap, return_softmax) == (0.0, False, 0.0, False)
        return *emulated_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size_left,
                                 window_size_right), None, None

    def backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                 dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
                 deterministic, rng_state=None, zero_tensors=False):
        assert (dropout_p, causal, softcap, alibi_slopes) == (0.0, False, 0.0, None)
        assert deterministic is torch.are_deterministic_algorithms_enabled()
        grads = emulated_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale,
                                  window_size_left, window_size_right)
        for buffer, grad in zip((dq, dk, dv), grads, strict=True):
            buffer.copy_(grad)

    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", loader=None)
    package.flash_attn_interface = interface
    interface._wrapped_flash_attn_varlen_forward = forward
    interface._wrapped_flash_attn_varlen_backward = backward
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    return "flash_attn"


@pytest.mark.parametrize("fixture", ["torch_flash", "flash_attn"])
def test_adapter_equals_dense(request, fixture):
    backend = request.getfixturevalue(fixture)
    for seed in range(60):
        case = random_case(seed)
        plan = build_plan(case.layout, case.pattern, head_dim=8, dtype=torch.float64, backend=backend,
                          queries=case.queries)
        found = outputs(case, partial(sparse_attention, plan=plan))
        assert worst(found, dense_outputs(case)) < 1e-10, f"seed {seed}"


def test_plan_moves_everything_to_its_device(torch_flash):
    """A plan for the GPU keeps no CPU tensor; here, none but meta tensors."""
    case = random_case(6)
    is_global_T = case.layout.is_global_T | (case.layout.position_T == 7)
    plan = build_plan(replace(case.layout, is_global_T=is_global_T), case.pattern, head_dim=8, dtype=torch.float64,
                      backend=torch_flash, queries=case.queries).to("meta")
    seen = []

    def visit(value):
        if isinstance(value, Tensor):
            seen.append(value.device.type)
        elif isinstance(value, tuple | list):
            [visit(item) for item in value]
        elif hasattr(value, "__dataclass_fields__"):
            [visit(getattr(value, name)) for name in value.__dataclass_fields__]
    visit(plan)
    assert len(seen) > 4 and set(seen) == {"meta"}


@pytest.mark.parametrize(("name", "schema"), [
    ("_flash_attention_forward",
     "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
     "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
     "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, "
     "Tensor? alibi_slopes=None"),
    ("_flash_attention_backward",
     "aten::_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
     "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
     "bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, SymInt? window_size_left=None, "
     "SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)"),
    ("_scaled_dot_product_flash_attention_for_cpu",
     "aten::_scaled_dot_product_flash_attention_for_cpu(Tensor query, Tensor key, Tensor value, float dropout_p=0., "
     "bool is_causal=False, *, Tensor? attn_mask=None, float? scale=None) -> (Tensor output, Tensor logsumexp)"),
    ("_scaled_dot_product_flash_attention_for_cpu_backward",
     "aten::_scaled_dot_product_flash_attention_for_cpu_backward(Tensor grad_out, Tensor query, Tensor key, "
     "Tensor value, Tensor out, Tensor logsumexp, float dropout_p, bool is_causal, *, Tensor? attn_mask=None, "
     "float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"),
])
def test_schemas_of_private_operations(name, schema):
    """Later versions of PyTorch may append optional arguments to the forward; anything else needs a new look."""
    assert str(getattr(torch.ops.aten, name).default._schema).startswith(schema)
