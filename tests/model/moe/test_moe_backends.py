"""The backends against each other, and the choice among them."""

from __future__ import annotations

import pytest
import torch

from model.config import MoEConfig
from model.errors import BackendUnavailable, ConfigError
from model.moe import megablocks
from model.moe.backends import BACKENDS, choose_backend
from model.moe.experts import Experts
from model.moe.layer import MoELayer

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
COUNTS = {"even": [16, 16, 16, 16], "uneven": [1, 40, 0, 23], "one": [0, 0, 64, 0]}


def run(backend: str, counts: list[int], gated: bool, dtype: torch.dtype, device: str = "cpu"):
    """[y, gradients of x, w1, w2, w3] in fp32, from numbers that bf16 holds exactly."""
    experts = Experts(len(counts), 32, 48, gated=gated, backend=backend)
    experts.init_weights(0, 0)
    experts.to(device, torch.bfloat16).to(dtype)
    generator = torch.Generator().manual_seed(1)
    x_ND, grad_ND = (torch.randn(sum(counts), 32, generator=generator).to(device, torch.bfloat16).to(dtype)
                     for _ in range(2))
    y_ND = experts(x_ND.requires_grad_(), torch.tensor(counts, device=device))
    grads = torch.autograd.grad(y_ND, [x_ND, *experts.parameters()], grad_ND)
    assert all(grad.is_contiguous() for grad in grads)
    return [value.float().cpu() for value in (y_ND.detach(), *grads)]


def relative(own, wanted):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(own, wanted, strict=True))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "grouped_mm"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-2)])
def test_backends_agree(backend, gated, counts, dtype, tolerance):
    assert relative(run(backend, counts, gated, dtype), run("reference", counts, gated, torch.float64)) < tolerance


def check_saved_weights(backend: str, gated: bool) -> None:
    """Each weight is saved once, and none as a view."""
    experts = Experts(3, 16, 16, gated=gated, backend=backend)
    experts.init_weights(0, 0)
    by_memory = {parameter.data_ptr(): parameter for parameter in experts.parameters()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        experts(torch.randn(9, 16, requires_grad=True), torch.tensor([4, 0, 5]))
    weights = [t for t in saved if t.untyped_storage().data_ptr() in by_memory]
    assert len(weights) == len(by_memory)
    assert all(t._base is None and t.shape == by_memory[t.data_ptr()].shape for t in weights)


def test_no_tokens_give_gradients_of_zeros():
    y_ND, *grads = run("reference", [0, 0, 0, 0], True, torch.float32)
    assert y_ND.shape == (0, 32) and [grad.shape for grad in grads[1:]] == [(4, 48, 32)] * 3
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("backend", ["cpu", "grouped_mm"])
@pytest.mark.parametrize("gated", [True, False])
def test_nothing_saved_for_backward_is_a_view_of_a_weight(backend, gated):
    """A saved view would keep the memory of weights that ZeRO-3 lets go between forward and backward."""
    check_saved_weights(backend, gated)


def test_mixed_precision_input_keeps_its_dtype():
    experts = Experts(2, 16, 16).to(torch.bfloat16)
    experts.init_weights(0, 0)
    assert experts(torch.randn(4, 16), torch.tensor([1, 3])).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_auto_takes_cpu_on_the_cpu(dtype):
    name, why = choose_backend("auto", "cpu", dtype, 12, 9)
    assert name == "cpu" and str(dtype) in why


@pytest.mark.parametrize(("name", "device", "dtype", "width", "ffn", "message"), [
    ("grouped_mm", "cpu", torch.float32, 34, 48, r"model\.width = 34 must be a multiple of 4"),
    ("grouped_mm", "cpu", torch.bfloat16, 32, 20, r"ffn.* = 20 must be a multiple of 8"),
    ("grouped_mm", "cpu", torch.float64, 32, 48, r"no torch\.float64 on cpu"),
    ("grouped_mm", "cuda", torch.float32, 32, 48, r"no torch\.float32 on cuda"),
    ("cpu", "cuda", torch.bfloat16, 32, 48, "the model is on cuda"),
    ("megablocks", "cpu", torch.float32, 40, 48, "the model is on cpu, where Triton's kernels"),
    ("megablocks", "cuda", torch.float32, 32, 48, r"no torch\.float32 on cuda"),
])
def test_a_name_never_falls_back(name, device, dtype, width, ffn, message):
    wanted = rf"model\.moe\.backend: '{name}' cannot run here: .*{message}"
    with pytest.raises(BackendUnavailable, match=wanted) as caught:
        choose_backend(name, device, dtype, width, ffn)
    chosen, _ = choose_backend("auto", device, dtype, width, ffn)
    assert f"auto, which would choose '{chosen}'" in str(caught.value)


def test_the_layer_refuses_what_cannot_run():
    layer = MoELayer(34, MoEConfig(experts=2, ffn=48, backend="grouped_mm"))
    layer.init_weights(0, 0)
    with pytest.raises(BackendUnavailable):
        layer(torch.randn(3, 34), torch.zeros(3, dtype=torch.int64), 1)


def test_more_elements_than_32_bits_count_are_refused():
    order = megablocks.Order(torch.empty(2 ** 22, device="meta"), torch.empty(0), torch.empty(0), 2)
    with pytest.raises(ConfigError, match=r"32 bits.* = 4194304 x 512 are more"):
        megablocks.scatter_to_experts(torch.empty(2 ** 21, 512, device="meta"), order)


def test_an_unknown_name_is_an_error_that_lists_the_names():
    with pytest.raises(ConfigError, match=f"tutel.*auto, {', '.join(BACKENDS)}"):
        choose_backend("tutel", "cpu", torch.float32, 32, 48)


def test_auto_on_a_gpu_passes_over_the_cpu_and_says_so():
    name, why = choose_backend("auto", "cuda", torch.float16, 32, 48)
    assert name == "reference"
    assert "not cpu: the model is on cuda" in why and "not grouped_mm" in why


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ["grouped_mm", "megablocks"])
def test_products_on_a_gpu(name, counts, gated):
    if name == "megablocks":
        pytest.importorskip("megablocks")
    own = run(name, counts, gated, torch.bfloat16, "cuda")
    assert relative(own, run("reference", counts, gated, torch.float64)) < 1e-2


@pytest.mark.gpu
@needs_cuda
def test_a_gpu_is_never_waited_for():
    layer = MoELayer(64, MoEConfig(experts=8, top_k=2, ffn=64, shared_ffn=64, jitter=0.1)).to(torch.bfloat16)
    layer.init_weights(0, 0)
    layer.cuda()
    x_TD = torch.randn(128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    row_T, noise_TD = torch.zeros(128, dtype=torch.int64, device="cuda"), torch.rand(128, 64, device="cuda")

    def step():
        y_TD, aux = layer(x_TD, row_T, 1, noise_TD)
        (y_TD.float().square().sum() + aux.balance_sum + aux.z_sum).backward()

    step()  # the first step may wait: kernels load, memory is reserved
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
