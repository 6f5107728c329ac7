"""MegaBlocks' dropless MoE (its `grouped` implementation): radix sort, Triton kernels that gather and scatter, grouped
matrix products; imported when first asked for.

It works on our parameters, whose layout is its own, without a copy; router, losses and the scale of gradients stay
ours, so that neither its module-global lists of losses nor its `gradient_scale` has a part here. Two of its parts are
compiled, `megablocks_ops` and `grouped_gemm`; where one is not installed, `model/moe/stand_ins/` has it in PyTorch.
Its gather waits for the GPU, once forward and once backward in each layer, to read the number of its rows.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from model.errors import ConfigError
from model.moe import grouped_mm
from model.moe.activation import hidden
from model.moe.stand_ins import grouped_gemm, megablocks_ops

if TYPE_CHECKING:
    from model.moe.experts import Experts

_STAND_INS = {"megablocks_ops": megablocks_ops, "grouped_gemm": grouped_gemm}
_LARGEST = 2 ** 31
"""Its kernels count elements in 32 bits."""


def unavailable(device: torch.device, dtype: torch.dtype, width: int, ffn: int) -> str | None:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the model is on cpu, where Triton's kernels only run in its interpreter (TRITON_INTERPRET=1, for tests)"
    refusal = grouped_mm.unavailable(device, dtype, width, ffn)
    if refusal is not None:
        return refusal
    try:
        _load()
    except ImportError as error:
        return f"MegaBlocks cannot be imported ({error}); `make gpu` installs it"
    return None


def remark() -> str:
    """Which compiled parts run as PyTorch instead."""
    replaced = _load().replaced
    return f"with PyTorch in place of {' and '.join(replaced)}" if replaced else ""


def run(x_ND: Tensor, counts_E: Tensor, experts: Experts) -> Tensor:
    """See `model/moe/backends.py` for the contract. The compiled grouped_gemm wants the counts on the host."""
    megablocks = _load()
    sizes_E = counts_E if "grouped_gemm" in megablocks.replaced else counts_E.cpu()

    def product(rows: Tensor, weight: Tensor, *, transposed: bool) -> Tensor:
        return megablocks.gmm(rows, weight, sizes_E, transposed)

    x_ND = grouped_mm.row_major(x_ND)
    gate_NF = product(x_ND, experts.w1, transposed=True)
    up_NF = None if experts.w3 is None else product(x_ND, experts.w3, transposed=True)
    return product(hidden(gate_NF, up_NF), experts.w2, transposed=False)


class Order(NamedTuple):
    """assignment_N: which of the T * k assignments lies in sorted place n; int32. bin_N, ends_B: its kernels' bins.

    Bins are for padding. Without it a row's place is its number whatever the bins, and one bin of all rows says so.
    """

    assignment_N: Tensor
    bin_N: Tensor
    ends_B: Tensor
    top_k: int


def sort_by_expert(expert_index_Tk: Tensor) -> Order:
    """Order of the assignments `expert_index_Tk` (int64)."""
    _, assignment_N = _load().ops.sort(expert_index_Tk.flatten().int())
    bin_N = torch.zeros_like(assignment_N)
    return Order(assignment_N, bin_N, bin_N.new_full((1,), len(bin_N)), expert_index_Tk.shape[1])


def scatter_to_experts(x_TD: Tensor, order: Order) -> Tensor:
    """[N, D], every token once for each of its experts, in sorted order."""
    _check_size(len(order.assignment_N), x_TD.shape[1])
    return _load().ops.gather(x_TD.contiguous(), order.assignment_N, order.bin_N, order.ends_B, order.top_k)


def gather_from_experts(y_ND: Tensor, weight_Tk: Tensor, order: Order) -> Tensor:
    """[T, D], every token's sum of its experts' outputs times weight_Tk."""
    return _load().ops.scatter(y_ND.contiguous(), order.assignment_N, order.bin_N, weight_Tk.flatten(), order.ends_B,
                               order.top_k)


def _check_size(rows: int, width: int) -> None:
    if rows * width >= _LARGEST:
        raise ConfigError("model.moe.backend", f"'megablocks' counts the elements of a batch in 32 bits, and tokens x "
                          f"top_k x width = {rows} x {width} are more: use grouped_mm, or a smaller "
                          "train_micro_batch_size_per_gpu")


class _MegaBlocks(NamedTuple):
    ops: ModuleType
    gmm: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    replaced: list[str]


@lru_cache
def _load() -> _MegaBlocks:
    for name, stand_in in _STAND_INS.items():
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = stand_in
    from megablocks import grouped_gemm_util, ops
    return _MegaBlocks(ops, grouped_gemm_util.ops.gmm,
                       [name for name, stand_in in _STAND_INS.items() if sys.modules[name] is stand_in])
