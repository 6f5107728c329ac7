"""Makes the real MegaBlocks importable and runnable without a GPU.

Its Triton kernels run in Triton's interpreter; its CUDA extension `megablocks_ops` and `grouped_gemm` are replaced by
a few lines of PyTorch. Routing, sorting, gathering, scattering and both losses remain MegaBlocks' own code.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch


@contextmanager
def megablocks_layers() -> Iterator[ModuleType]:
    """The module `megablocks.layers`, with `dmoe`, `moe`, `router` and `arguments` imported; it runs inside the
    context only. Skips the test, saying what is missing, where MegaBlocks is not installed."""
    for package in ("triton", "megablocks", "stk"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the real MegaBlocks cannot be imported here: no package {package} (pip install triton; "
                        "pip install --no-deps --no-build-isolation megablocks==0.10.0 stanford-stk==0.7.1)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setitem(sys.modules, "megablocks_ops", _megablocks_ops())
        patch.setitem(sys.modules, "grouped_gemm", _grouped_gemm())
        for name in ("arguments", "router", "moe", "dmoe"):
            importlib.import_module(f"megablocks.layers.{name}")
        kernels = importlib.import_module("megablocks.backend.kernels")
        for name in ("_padded_copy", "_padded_copy_wgrad", "_binned_copy", "_binned_copy_wgrad"):
            autotuner = getattr(kernels, name)
            autotuner.configs = autotuner.configs[:1]  # timing several would need a GPU driver
        yield importlib.import_module("megablocks.layers")


def _megablocks_ops() -> ModuleType:
    def sort(x, end_bit, x_out, iota_out):
        values, order = torch.sort(x, stable=True)
        x_out.copy_(values)
        iota_out.copy_(order)

    ops = ModuleType("megablocks_ops")
    ops.sort = sort
    ops.histogram = lambda x, bins: torch.bincount(x.long(), minlength=bins).int()
    ops.inclusive_cumsum = lambda x, dim, out: out.copy_(x.cumsum(dim))
    ops.exclusive_cumsum = lambda x, dim, out: out.copy_(x.cumsum(dim) - x)
    return ops


def _grouped_gemm() -> ModuleType:
    def gmm(a, b, batch_sizes, trans_b=False):
        return torch.cat([rows @ (matrix.t() if trans_b else matrix)
                          for rows, matrix in zip(a.split(batch_sizes.tolist()), b.unbind(0), strict=True)])

    module = ModuleType("grouped_gemm")
    module.backend = module.ops = ModuleType("grouped_gemm.ops")
    module.ops.gmm = gmm
    return module
