"""What stands in for MegaBlocks' compiled parts, against plain loops."""

from __future__ import annotations

import pytest
import torch

from model.moe.stand_ins import grouped_gemm, megablocks_ops


def test_extension():
    keys_N = torch.tensor([3, 0, 2, 3, 0, 0], dtype=torch.int32)
    sorted_N, order_N = torch.empty_like(keys_N), torch.empty_like(keys_N)
    megablocks_ops.sort(keys_N, 2, sorted_N, order_N)
    assert sorted_N.tolist() == [0, 0, 0, 2, 3, 3] and order_N.tolist() == [1, 4, 5, 2, 0, 3]
    counts = megablocks_ops.histogram(keys_N, 5)
    assert counts.tolist() == [3, 0, 1, 2, 0] and counts.dtype == torch.int32
    out = torch.empty(1, 5, dtype=torch.int32)
    megablocks_ops.inclusive_cumsum(counts[None], 1, out)
    assert out.tolist() == [[3, 3, 4, 6, 6]]
    megablocks_ops.exclusive_cumsum(counts[None], 1, out)
    assert out.tolist() == [[0, 3, 3, 4, 6]]


@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("sizes", [[2, 0, 5], [0, 7, 0], [0, 0, 0]])
def test_grouped_products(sizes, trans_b):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(sum(sizes), 8, generator=generator).requires_grad_()
    b = torch.randn(3, *((12, 8) if trans_b else (8, 12)), generator=generator).requires_grad_()
    grad = torch.randn(12, generator=generator).expand(sum(sizes), 12)  # as the gradient of a sum is: no strides
    own = grouped_gemm.ops.gmm(a, b, torch.tensor(sizes), trans_b=trans_b)
    wanted = torch.cat([rows @ (matrix.t() if trans_b else matrix)
                        for rows, matrix in zip(a.split(sizes), b.unbind(0), strict=True)])
    torch.testing.assert_close(own, wanted)
    torch.testing.assert_close(torch.autograd.grad(own, [a, b], grad), torch.autograd.grad(wanted, [a, b], grad))
