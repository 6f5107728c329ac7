"""Independent references for sparse attention: a dense softmax over the predicate's mask, and random packed streams."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.pattern import AttentionPattern, allowed
from model.batch import TokenLayout


@dataclass
class Case:
    """A random stream with its pattern, inputs and the rows that ask."""

    layout: TokenLayout
    pattern: AttentionPattern
    queries: str
    rows: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @property
    def mask_HQT(self) -> Tensor:
        return allowed(self.layout, self.pattern)[:, self.rows]

    def to(self, dtype: torch.dtype) -> "Case":
        moved = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in (self.q, self.k, self.v, self.dout)]
        return Case(self.layout, self.pattern, self.queries, self.rows, *moved)


def dense_attention(q_QHK: Tensor, k_THK: Tensor, v_THK: Tensor, mask_HQT: Tensor) -> Tensor:
    score_HQT = torch.einsum("qhd,khd->hqk", q_QHK, k_THK) / q_QHK.shape[-1] ** 0.5
    weight_HQT = score_HQT.masked_fill(~mask_HQT, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weight_HQT, v_THK)


def outputs(case: Case, attend) -> list[Tensor]:
    """[out, dq, dk, dv] of attend(q, k, v)."""
    out = attend(case.q, case.k, case.v)
    return [out.detach(), *torch.autograd.grad(out, (case.q, case.k, case.v), case.dout)]


def dense_outputs(case: Case) -> list[Tensor]:
    """The same in float64."""
    case = case.to(torch.float64)
    return outputs(case, lambda q, k, v: dense_attention(q, k, v, case.mask_HQT))


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    return max((a.double() - b).abs().max().item() if b.numel() else 0.0 for a, b in zip(found, expected, strict=True))


def stream(documents: list[tuple[int, int, int]]) -> TokenLayout:
    """In packed order, no global tokens; documents as (source tokens, target tokens, draws)."""
    rows = [(d, p, False, 0) for d, (source, _, _) in enumerate(documents) for p in range(source)]
    rows += [(d, source + p, True, r) for d, (source, target, draws) in enumerate(documents)
             for r in range(draws) for p in range(target)]
    rows.sort(key=lambda row: (row[0], row[2], row[3], row[1]))
    document_T, position_T, is_target_T, draw_T = (torch.tensor(column) for column in zip(*rows, strict=True))
    return TokenLayout(document_T, position_T, is_target_T, draw_T, torch.zeros(len(rows), dtype=torch.bool))


def random_case(seed: int) -> Case:
    """1-4 documents (empty sources, no target, single tokens), 1-3 draws, windows symmetric or not, dilations per
    head, global tokens from none to all, joint or cached, tokens in order or shuffled."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cached = rng.random() < 0.6
    longest = rng.choice([30, 30, 150])
    documents = []
    for _ in range(rng.randint(1, 4)):
        source, target = rng.choice([0, 1, rng.randint(1, longest)]), rng.choice([0, 1, rng.randint(1, longest)])
        documents.append((source, target or int(source == 0), rng.randint(1, 3) if cached else 1))
    layout = stream(documents)
    is_global_T = torch.rand(len(layout), generator=generator) < rng.choice([0, 0, 0.05, 0.15, 1])
    if rng.random() < 0.3:
        is_global_T |= layout.position_T < 3
    fields = [layout.document_T, layout.position_T, layout.is_target_T, layout.draw_T, is_global_T]
    if rng.random() < 0.3:
        order_T = torch.randperm(len(layout), generator=generator)
        fields = [field[order_T] for field in fields]
    layout = TokenLayout(*fields)
    heads, tokens = rng.randint(1, 4), len(layout)
    reach = rng.randint(0, 70)
    window = rng.choice([(rng.randint(0, 6), rng.randint(0, 6)), (reach, reach)])
    pattern = AttentionPattern(window, tuple(rng.choice([1, 1, 2, 3, 5]) for _ in range(heads)), cached)
    queries = rng.choice(["all", "target"]) if cached else "all"
    rows = layout.is_target_T.nonzero().flatten() if queries == "target" else torch.arange(tokens)
    q, k, v, dout = (torch.randn(count, heads, 8, dtype=torch.float64, generator=generator)
                     for count in (len(rows), tokens, tokens, len(rows)))
    return Case(layout, pattern, queries, rows, q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout)
