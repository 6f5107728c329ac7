"""What many tokens share gets the sum of their gradients in bf16 too, which itself cannot count beyond 256."""

from types import SimpleNamespace

import torch

from model.denoiser import Denoiser
from model.layers import ModulatedNorm
from tests.model.small import small_config

TOKENS = 4096


def assert_near(grads: dict[torch.dtype, torch.Tensor]) -> None:
    torch.testing.assert_close(grads[torch.bfloat16].double(), grads[torch.float64], rtol=0.02,
                               atol=0.02 * TOKENS ** 0.5)


def test_the_gradient_of_a_noise_level():
    torch.manual_seed(0)
    norm, grads = ModulatedNorm(8, 4), {}
    x_TD, condition_CD, grad_TD = torch.randn(TOKENS, 8), torch.randn(2, 4), torch.randn(TOKENS, 8) + 1
    condition_T = (torch.arange(TOKENS) < 16).long()
    for dtype in (torch.float64, torch.bfloat16):
        norm.to(dtype).zero_grad()
        norm(x_TD.to(dtype), condition_CD.to(dtype), condition_T).backward(grad_TD.to(dtype))
        grads[dtype] = norm.modulation.bias.grad.clone()
    assert_near(grads)


def test_the_gradient_of_a_side():
    torch.manual_seed(0)
    config, grads = small_config(), {}
    denoiser = Denoiser(config)
    denoiser.init_weights(0)
    inputs_TE = torch.randn(TOKENS, config.embed_dim * (2 if config.diffusion.self_conditioning > 0 else 1))
    position_T, grad_TD = torch.arange(TOKENS), torch.randn(TOKENS, config.width) + 1
    plan = SimpleNamespace(neighbour_TW=position_T[:, None].expand(-1, config.local_mixing), position_T=position_T,
                           is_target_T=position_T >= TOKENS - 16)
    for dtype in (torch.float64, torch.bfloat16):
        denoiser.to(dtype).zero_grad()
        x_TD, _, _ = denoiser._enter(inputs_TE.to(dtype), torch.zeros(1), plan)
        x_TD.backward(grad_TD.to(dtype))
        grads[dtype] = denoiser.side.grad.clone()
    assert_near(grads)
