"""Sparse attention as one differentiable operation over the disjoint parts of a plan.

With lse the log of the sum of exponentiated scores, parts merge exactly: lse = logaddexp(lse_1, lse_2) and
out = out_1 * exp(lse_1 - lse) + out_2 * exp(lse_2 - lse). The attention weight of a pair, exp(score - lse), and
sum(dout * out) of a query are the same for all its parts once lse and out are the merged ones, so the gradients are
the sums over the parts' own backward passes, each given the merged values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from model.attention.plan import AttentionPlan, Rows
from model.attention.segments import lse_dtype


def sparse_attention(q_QHK: Tensor, k_THK: Tensor, v_THK: Tensor, plan: AttentionPlan) -> Tensor:
    """softmax(q k / sqrt(K)) v over the pairs of `plan` -> [Q, H, K].

    q holds a row per query of the plan, k and v a row per token; K is the head width the plan was built for.
    """
    expected = (plan.queries, plan.heads), (plan.keys, plan.heads), (plan.keys, plan.heads)
    given = tuple(tuple(x.shape[:2]) for x in (q_QHK, k_THK, v_THK))
    if given != expected:
        raise ValueError(f"rows and heads of q, k, v are {given}, but the plan is for {expected}")
    return _SparseAttention.apply(q_QHK, k_THK, v_THK, plan)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        out, lse_QH = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=lse_dtype(q.dtype))
        for part in plan.parts:
            here = part.q_rows, part.heads
            keys = part.k_rows, part.heads
            part_out, part_lse_HQ = part.kernel.forward(_take(q, *here), _take(k, *keys), _take(v, *keys), plan.scale)
            if part_out.shape == out.shape and part.sets_rows and isinstance(part.q_rows, slice):
                out, lse_QH = part_out, part_lse_HQ.T
            elif part.sets_rows:
                _put(out, *here, part_out)
                _put(lse_QH, *here, part_lse_HQ.T)
            else:
                _merge(out, lse_QH, *here, part_out, part_lse_HQ.T)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, out, lse_QH)
            ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse_QH = ctx.saved_tensors
        plan, dout = ctx.plan, dout.contiguous()
        kept_dout = dout if plan.replaced is None else dout.index_fill(0, plan.replaced, 0)
        dtype = q.dtype if len(plan.parts) == 1 else lse_dtype(q.dtype)
        dq, dk, dv = _Total(q, dtype, whole=True), _Total(k, dtype, plan.sets_keys), _Total(v, dtype, plan.sets_keys)
        for part in plan.parts:
            here, keys = (part.q_rows, part.heads), (part.k_rows, part.heads)
            dq_part, dk_part, dv_part = part.kernel.backward(
                _take(kept_dout if part.replaced else dout, *here), _take(q, *here), _take(k, *keys),
                _take(v, *keys), _take(out, *here), _take(lse_QH, *here).T, plan.scale)
            dq.collect(*here, dq_part, part.sets_rows)
            dk.collect(*keys, dk_part, part.sets_keys)
            dv.collect(*keys, dv_part, part.sets_keys)
        return dq.result(), dk.result(), dv.result(), None


class _Total:
    """The gradient of `x` out of its parts, kept in `dtype`. whole: the parts that set it set every row and head."""

    def __init__(self, x: Tensor, dtype: torch.dtype, whole: bool):
        self.x, self.dtype, self.whole = x, dtype, whole
        self.total: Tensor | None = None

    def collect(self, rows: Rows, heads: slice, grad: Tensor, sets: bool) -> None:
        if self.total is None and grad.shape == self.x.shape and isinstance(rows, slice):
            self.total = grad.to(self.dtype)
            return
        if self.total is None:
            self.total = (torch.empty_like if self.whole else torch.zeros_like)(self.x, dtype=self.dtype)
        if sets:
            _put(self.total, rows, heads, grad)
        elif isinstance(rows, slice):
            self.total[rows, heads] += grad
        else:
            _put(self.total, rows, heads, _take(self.total, rows, heads) + grad)

    def result(self) -> Tensor:
        return torch.zeros_like(self.x) if self.total is None else self.total.to(self.x.dtype)


def _take(x: Tensor, rows: Rows, heads: slice) -> Tensor:
    x = x[:, heads]
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _put(x: Tensor, rows: Rows, heads: slice, value: Tensor) -> None:
    if isinstance(rows, slice):
        x[rows, heads] = value
    else:
        x[:, heads].index_copy_(0, rows, value.to(x.dtype))


def _merge(out: Tensor, lse_QH: Tensor, rows: Rows, heads: slice, part_out: Tensor, part_lse_QH: Tensor) -> None:
    lse = _take(lse_QH, rows, heads)
    share = torch.sigmoid(part_lse_QH - lse)[..., None]  # exp(part_lse - merged lse)
    both = torch.lerp(_take(out, rows, heads).to(lse.dtype), part_out.to(lse.dtype), share)
    _put(out, rows, heads, both)
    _put(lse_QH, rows, heads, torch.logaddexp(lse, part_lse_QH))
