"""The choice of a backend: `auto` says why, a name never falls back."""

import sys

import pytest
import torch

from model.attention.backends import choose_backend
from model.errors import BackendUnavailable, ConfigError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_auto_on_the_cpu(dtype):
    backend, reason = choose_backend("auto", "cpu", dtype, 32)
    assert backend == "cpu_band"
    assert "not flash_attn, torch_flash: FlashAttention-2 has no kernels for a cpu device" in reason


@pytest.mark.parametrize("name", ["flash_attn", "torch_flash"])
def test_a_name_never_falls_back(name):
    with pytest.raises(BackendUnavailable, match=r"cannot run here: .*a cpu device.*auto.*'cpu_band'") as error:
        choose_backend(name, torch.device("cpu"), torch.float32, 32)
    assert error.value.key == "model.attention.backend"


@pytest.mark.parametrize("name", ["cpu_band", "reference"])
def test_a_name_that_runs_is_taken(name):
    assert choose_backend(name, "cpu", torch.float32, 32) == (name, "asked for by name")


def test_unknown_name():
    with pytest.raises(ConfigError, match="'flash' is not a backend; choose auto, flash_attn"):
        choose_backend("flash", "cpu", torch.float32, 32)


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", None)


@pytest.mark.parametrize(("dtype", "head_dim", "backend", "why"), [
    (torch.bfloat16, 64, "torch_flash", "not flash_attn: flash-attn cannot be imported"),
    (torch.float32, 64, "reference", "not flash_attn, torch_flash: the dtype is torch.float32"),
    (torch.bfloat16, 60, "reference", "not flash_attn, torch_flash: the head width is 60"),
    (torch.bfloat16, 264, "reference", "not flash_attn, torch_flash: the head width is 264"),
])
def test_auto_on_a_gpu(cuda, dtype, head_dim, backend, why):
    chosen, reason = choose_backend("auto", "cuda", dtype, head_dim)
    assert chosen == backend and why in reason and "not cpu_band" not in reason.split(why)[0]


def test_a_broken_package_names_its_error_and_the_install(cuda):
    with pytest.raises(BackendUnavailable, match=r"cannot be imported \(.*flash_attn.*`make gpu` .*'torch_flash'"):
        choose_backend("flash_attn", "cuda", torch.bfloat16, 64)


def test_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(BackendUnavailable, match="Tesla V100 is older than compute capability"):
        choose_backend("torch_flash", "cuda", torch.float16, 64)
