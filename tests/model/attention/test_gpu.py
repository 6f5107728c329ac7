"""The real kernels, where there is a CUDA device: composed attention against float64 dense attention."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from model.attention.backends import choose_backend
from model.attention.composed import sparse_attention
from model.attention.pattern import AttentionPattern, allowed
from model.attention.plan import build_plan
from tests.model.attention.oracle import dense_attention, stream

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PLAIN = AttentionPattern((64, 64), (1,) * 4, False)
DILATED = AttentionPattern((40, 24), (1, 1, 2, 4), False)


@pytest.fixture(params=["flash_attn", "torch_flash", "reference"])
def backend(request):
    if request.param == "flash_attn":
        pytest.importorskip("flash_attn")
    return request.param


def everything(attend, inputs, dout):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


@pytest.mark.parametrize("queries", ["all", "target"])
@pytest.mark.parametrize("globals_at", [(), range(8), (0, 130, 331)])
@pytest.mark.parametrize("pattern", [PLAIN, DILATED])
@pytest.mark.parametrize("cached", [False, True])
def test_errors_are_those_of_plain_bfloat16(backend, pattern, globals_at, queries, cached):
    if queries == "target" and not cached:
        pytest.skip("only in cached mode")
    choose_backend(backend, "cuda", torch.bfloat16, 64)
    layout = stream([(500, 130, 2 if cached else 1), (0, 37, 1), (300, 1, 1), (1, 0, 1), (257, 64, 1)])
    layout = replace(layout, is_global_T=torch.isin(layout.position_T, torch.tensor(list(globals_at))))
    pattern = replace(pattern, cached=cached)
    rows = layout.is_target_T.nonzero().flatten() if queries == "target" else torch.arange(len(layout))
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(count, 4, 64, generator=generator).cuda().bfloat16()
                     for count in (len(rows), len(layout), len(layout), len(rows)))
    plan = build_plan(layout, pattern, head_dim=64, dtype=torch.bfloat16, backend=backend, queries=queries).to("cuda")
    mask = allowed(layout, pattern)[:, rows].cuda()
    dense = partial(dense_attention, mask_HQT=mask)
    exact = everything(dense, [x.double() for x in (q, k, v)], dout)
    plain = everything(dense, (q, k, v), dout)
    found = everything(partial(sparse_attention, plan=plan), (q, k, v), dout)
    for name, ours, theirs, truth in zip(("out", "dq", "dk", "dv"), found, plain, exact, strict=True):
        error, allowance = ((x.double() - truth).abs().max().item() for x in (ours, theirs))
        assert error <= 3 * allowance + 1e-5, f"{name}: {error} against {allowance} of plain bfloat16"


def test_no_host_synchronisation(backend):
    layout = stream([(500, 130, 2), (257, 64, 1)])
    layout = replace(layout, is_global_T=layout.position_T % 100 == 0)
    if backend == "reference":
        pytest.skip("loops over segments on the host")
    plan = build_plan(layout, replace(DILATED, cached=True), head_dim=64, dtype=torch.bfloat16, backend=backend)
    plan = plan.to("cuda")
    q, k, v = (torch.randn(len(layout), 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
               for _ in range(3))
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = sparse_attention(q, k, v, plan)
        torch.autograd.grad(out, (q, k, v), out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_deterministic_backward(backend):
    layout = stream([(900, 130, 1), (257, 64, 1)])
    plan = build_plan(layout, DILATED, head_dim=64, dtype=torch.bfloat16, backend=backend).to("cuda")
    inputs = [torch.randn(len(layout), 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (everything(partial(sparse_attention, plan=plan), inputs[:3], inputs[3]) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
