"""Makes the real MegaBlocks run without a GPU: its Triton kernels in Triton's interpreter, its compiled parts replaced
by our stand-ins. Routing, sorting, gathering, scattering and both losses remain MegaBlocks' own code.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest


@contextmanager
def megablocks_layers() -> Iterator[ModuleType]:
    """The module `megablocks.layers`, with `dmoe`, `moe`, `router` and `arguments` imported; it runs inside the
    context only. Skips the test, saying what is missing, where MegaBlocks is not installed, or fails where the
    environment has REQUIRE_MEGABLOCKS."""
    for package in ("triton", "megablocks", "stk"):
        if importlib.util.find_spec(package) is None:
            assert "REQUIRE_MEGABLOCKS" not in os.environ, f"REQUIRE_MEGABLOCKS is set and there is no {package}"
            pytest.skip(f"the real MegaBlocks cannot be imported here: no package {package} (`make test-megablocks` "
                        "has its own environment for it)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        megablocks = importlib.import_module("model.moe.megablocks")
        assert megablocks._load().replaced == ["megablocks_ops", "grouped_gemm"]
        for name in ("arguments", "router", "moe", "dmoe"):
            importlib.import_module(f"megablocks.layers.{name}")
        kernels = importlib.import_module("megablocks.backend.kernels")
        for name in ("_padded_copy", "_padded_copy_wgrad", "_binned_copy", "_binned_copy_wgrad"):
            autotuner = getattr(kernels, name)
            autotuner.configs = autotuner.configs[:1]  # timing several would need a GPU driver
        yield importlib.import_module("megablocks.layers")
