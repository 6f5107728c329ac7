"""Normalised and rotated queries and keys: against rotation as a complex product, and by what they are for."""

import pytest
import torch

from model.rotary import rotary_tables, rotated_heads

TOKENS, HEADS, WIDTH = 7, 3, 16
F64 = torch.float64


def inputs(dtype=F64):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(TOKENS, 3, HEADS, WIDTH, generator=generator, dtype=F64)
    gain = 1 + 0.3 * torch.randn(2, WIDTH, generator=generator, dtype=F64)
    tables = rotary_tables(torch.arange(TOKENS) + 3, WIDTH, 1e4)
    return qkv.to(dtype).requires_grad_(), gain.to(dtype).requires_grad_(), tables


def as_complex(qkv, gain, tables):
    cos, sin = (table.to(qkv.dtype) for table in tables)
    turn = torch.complex(cos, sin)[:, None]
    rotated = []
    for part in (0, 1):
        y = torch.nn.functional.rms_norm(qkv[:, part], (WIDTH,)) * gain[part]
        product = torch.complex(*y.chunk(2, -1)) * turn
        rotated.append(torch.cat((product.real, product.imag), -1))
    return *rotated, qkv[:, 2]


def test_equals_a_complex_product():
    qkv, gain, tables = inputs()
    grads = [torch.randn(TOKENS, HEADS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=F64)
             for seed in range(3)]
    ours, theirs = rotated_heads(qkv, gain, tables), as_complex(qkv, gain, tables)
    for own, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-6, atol=1e-6)  # the tables are rounded to fp32
    gradients = (torch.autograd.grad(outputs, (qkv, gain), grads) for outputs in (ours, theirs))
    for own, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_differences():
    qkv, gain, tables = inputs()
    tables = [table.double() for table in tables]
    assert torch.autograd.gradcheck(lambda qkv, gain: rotated_heads(qkv, gain, tables), (qkv, gain))


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_low_precision(dtype, most):
    qkv, gain, tables = inputs(dtype)
    ours = rotated_heads(qkv, gain, tables)
    exact = as_complex(qkv.double(), gain.double(), tables)
    assert all(own.dtype == dtype for own in ours)
    assert max((own.double() - wanted).abs().max() / wanted.abs().max() for own, wanted in zip(ours, exact,
                                                                                               strict=True)) < most
    grads = [torch.ones_like(own) for own in ours]
    own_grads = torch.autograd.grad(ours, (qkv, gain), grads)
    exact_grads = torch.autograd.grad(exact, (qkv, gain), [grad.double() for grad in grads])
    for own, wanted in zip(own_grads, exact_grads, strict=True):
        assert (own.double() - wanted.double()).abs().max() / wanted.abs().max() < most


def test_products_depend_on_distance_only():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, 3, 1, WIDTH, generator=generator, dtype=F64)
    q, k, _ = rotated_heads(one.repeat(TOKENS, 1, 1, 1), torch.ones(2, WIDTH, dtype=F64), inputs()[2])
    products = torch.einsum("ihd,jhd->ij", q, k)
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1], rtol=1e-5, atol=1e-6)
