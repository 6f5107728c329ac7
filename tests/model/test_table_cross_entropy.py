"""Cross-entropy in pieces against PyTorch's over all logits at once."""

import pytest
import torch

from model import table_cross_entropy as module
from model.table_cross_entropy import table_cross_entropy

TOKENS, WORDS, WIDTH = 23, 40, 8


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    x, table, bias = (torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
                      for shape in ((TOKENS, WIDTH), (WORDS, WIDTH), (WORDS,)))
    return x, table, bias, torch.randint(4, WORDS, (TOKENS,), generator=generator)


@pytest.mark.parametrize("at_once", [1, 5 * WORDS, 1000 * WORDS])
@pytest.mark.parametrize("never_meant", [False, True])
def test_equals_pytorch_with_all_gradients(monkeypatch, at_once, never_meant):
    monkeypatch.setattr(module, "_LOGITS_ON_CPU", at_once)
    x, table, bias, answer = inputs(torch.float64)
    hidden = bias.masked_fill(torch.arange(WORDS) == 3, -torch.inf) if never_meant else bias
    weight = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    whole = torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, table, hidden), answer, reduction="none")
    found = table_cross_entropy(x, table, hidden, answer)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    for own, wanted in zip(torch.autograd.grad((weight * found).sum(), (x, table, bias), retain_graph=True),
                           torch.autograd.grad((weight * whole).sum(), (x, table, bias)), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-11, atol=1e-12)


def test_nothing_is_asked_of_no_tokens():
    x, table, bias, answer = inputs(torch.float32)
    found = table_cross_entropy(x[:0], table, bias, answer[:0])
    assert found.shape == (0,)
    assert all(not gradient.any() for gradient in torch.autograd.grad(found.sum(), (x, table, bias)))


def test_logits_are_not_kept():
    x, table, bias, answer = inputs(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        table_cross_entropy(x, table, bias, answer)
    assert max(kept) < TOKENS * WORDS
