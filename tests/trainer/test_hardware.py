"""What is told of the hardware and asked of it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from trainer.hardware import flush_denormals, peak_flops, processor


def halved_below_the_least_normal() -> float:
    return float(torch.full((64,), 1.2e-38).mul(0.5).sum())


def test_denormal_numbers_become_zero_in_this_thread_and_those_it_starts():
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormal numbers")
    torch.set_flush_denormal(False)
    assert halved_below_the_least_normal() > 0
    try:
        flush_denormals()
        assert halved_below_the_least_normal() == 0
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(halved_below_the_least_normal).result() == 0
    finally:
        torch.set_flush_denormal(False)


def test_the_processor_has_a_name_and_no_peak_is_claimed_for_it():
    assert processor().strip()
    assert peak_flops(torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("Tesla T4", None)])
def test_a_card_has_the_peak_of_its_own_form(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == peak
