"""The composed operation against the dense oracle: outputs, gradients, counts, precision, refusals."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from model.attention import cpu_band
from model.attention.composed import sparse_attention
from model.attention.pattern import AttentionPattern
from model.attention.plan import build_plan
from model.errors import ConfigError
from tests.model.attention.oracle import dense_outputs, outputs, random_case, stream, worst

BACKENDS = ("reference", "cpu_band")


def plan_of(case, backend):
    return build_plan(case.layout, case.pattern, head_dim=case.q.shape[2], dtype=case.q.dtype, backend=backend,
                      queries=case.queries)


def sparse_outputs(case, backend):
    return outputs(case, partial(sparse_attention, plan=plan_of(case, backend)))


@pytest.mark.parametrize("tile_bytes", [1 << 12, cpu_band.TILE_BYTES])
@pytest.mark.parametrize("block", range(10))
def test_random_streams_equal_dense(monkeypatch, block, tile_bytes):
    """Small tiles stand for documents much longer than a tile."""
    monkeypatch.setattr(cpu_band, "TILE_BYTES", tile_bytes)
    for seed in range(32 * block, 32 * (block + 1)):
        case = random_case(seed)
        expected = dense_outputs(case)
        for backend in BACKENDS:
            assert plan_of(case, backend).pairs == int(case.mask_HQT.sum()), f"seed {seed}"
            assert worst(sparse_outputs(case, backend), expected) < 1e-10, f"seed {seed}, {backend}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [1, 2, 6])
def test_gradcheck(backend, seed):
    case = random_case(seed)
    attend = partial(sparse_attention, plan=plan_of(case, backend))
    assert torch.autograd.gradcheck(attend, (case.q, case.k, case.v), fast_mode=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("globals_at", [[], range(4), [3, 90, 501]])
def test_precision_on_long_windows(dtype, tolerance, globals_at):
    """Against float64 on the same rounded inputs; relative to the largest value."""
    layout = stream([(400, 200, 2), (37, 300, 1)])
    layout = replace(layout, is_global_T=torch.isin(layout.position_T, torch.tensor(list(globals_at))))
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(len(layout), 4, 32, generator=generator).to(dtype) for _ in range(4))
    case = replace(random_case(0), layout=layout, pattern=AttentionPattern((64, 64), (1, 1, 2, 3), True),
                   queries="all", rows=torch.arange(len(layout)), q=q.requires_grad_(), k=k.requires_grad_(),
                   v=v.requires_grad_(), dout=dout)
    for found, expected in zip(sparse_outputs(case, "cpu_band"), dense_outputs(case), strict=True):
        assert found.dtype == dtype
        assert worst([found], [expected]) < tolerance * expected.abs().max().item()


def test_inputs_need_not_be_contiguous():
    case = random_case(3)
    fused = torch.stack((case.k, case.v), dim=1).detach()
    k, v = (x.requires_grad_() for x in fused.unbind(1))
    spread = replace(case, k=k, v=v, dout=case.dout[:1, :1, :1].expand_as(case.dout))
    assert not spread.k.is_contiguous() and not spread.dout.is_contiguous()
    assert worst(sparse_outputs(spread, "cpu_band"), dense_outputs(spread)) < 1e-10


def test_saves_tensors_only_for_gradients():
    case = random_case(1)
    plan = plan_of(case, "cpu_band")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        sparse_attention(case.q.detach(), case.k.detach(), case.v.detach(), plan)
        with torch.no_grad():
            sparse_attention(case.q, case.k, case.v, plan)
        assert not saved
        sparse_attention(case.q, case.k, case.v, plan)
        assert len(saved) == 5


def test_repeats_bit_exactly():
    case = random_case(8).to(torch.float32)
    first, second = sparse_outputs(case, "cpu_band"), sparse_outputs(case, "cpu_band")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_shapes_are_checked():
    case = random_case(1)
    with pytest.raises(ValueError, match="plan is for"):
        sparse_attention(case.q[1:], case.k, case.v, plan_of(case, "reference"))


@pytest.mark.parametrize(("documents", "queries"), [([(3, 4, 2)], "all"), ([(3, 4, 1)], "target")])
def test_joint_refuses_draws_and_cached_sources(documents, queries):
    with pytest.raises(ConfigError, match=r"model\.diffusion\.conditioning"):
        build_plan(stream(documents), AttentionPattern((2, 2), (1,), False), head_dim=8, dtype=torch.float32,
                   backend="reference", queries=queries)


def test_gaps_in_positions_are_refused():
    layout = stream([(5, 0, 1), (6, 0, 1)])
    layout.position_T[9:] += 1
    with pytest.raises(ValueError, match="document 1"):
        build_plan(layout, AttentionPattern((2, 2), (1,), False), head_dim=8, dtype=torch.float32, backend="reference")


def test_many_scattered_globals_are_refused_and_a_long_prefix_is_not():
    layout = stream([(200, 0, 1)])
    arguments = {"head_dim": 8, "dtype": torch.float32, "backend": "reference"}
    pattern = AttentionPattern((2, 2), (1,), False)
    build_plan(replace(layout, is_global_T=layout.position_T < 100), pattern, **arguments)
    layout = replace(layout, is_global_T=(layout.position_T > 2) & (layout.position_T < 68))
    with pytest.raises(ConfigError, match="65 global tokens"):
        build_plan(layout, pattern, **arguments)


def test_masks_do_not_grow_with_the_document():
    """Only the blocks at its ends have masks of their own."""
    def mask_bytes(tokens):
        plan = build_plan(stream([(tokens, 0, 1)]), AttentionPattern((128, 128), (1, 2), False), head_dim=64,
                          dtype=torch.float32, backend="cpu_band")
        masks = [tile.mask for part in plan.parts for tile in part.kernel.tiles]
        return sum({mask.data_ptr(): mask.nbytes for mask in masks}.values())
    assert mask_bytes(16_384) == mask_bytes(32_768) > 0


def test_no_target_asks_nothing():
    layout = stream([(5, 0, 1)])
    plan = build_plan(layout, AttentionPattern((2, 2), (1,), True), head_dim=8, dtype=torch.float32,
                      backend="cpu_band", queries="target")
    q, k, v = torch.randn(0, 1, 8), torch.randn(5, 1, 8), torch.randn(5, 1, 8, requires_grad=True)
    out = sparse_attention(q, k, v, plan)
    assert out.shape == (0, 1, 8) and plan.pairs == 0
    assert torch.autograd.grad(out.sum(), v)[0].eq(0).all()
