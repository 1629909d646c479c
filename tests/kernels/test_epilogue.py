"""What follows a product against its plain twin: in Triton's interpreter on a CPU, else on the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paceline.kernels.activation import ACTIVATIONS, activate, gated
from paceline.kernels.epilogue import epilogue_refusal, finish_product
from paceline.kernels.gemv import Epilogue

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them
# The interpreter cuts bfloat16 off where the GPU rounds.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


def plain(x, epilogue):
    y = x if epilogue.bias_N is None else x + epilogue.bias_N
    if epilogue.activation is not None:
        y = gated(y, epilogue.activation) if epilogue.gated else activate(y, epilogue.activation)
    return y if epilogue.residual_TN is None else y + epilogue.residual_TN


def check(x, epilogue):
    bias, residual = epilogue.bias_N, epilogue.residual_TN
    wide = replace(
        epilogue,
        bias_N=None if bias is None else bias.double(),
        residual_TN=None if residual is None else residual.double(),
    )
    exact, torchs = plain(x.double(), wide), plain(x, epilogue)
    found = finish_product(x.clone(), epilogue)
    assert found.dtype == x.dtype
    assert found.shape == exact.shape
    # In float32 both are a few units in the last place.
    assert (found - exact).norm() <= 2 * (torchs - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, *sorted(ACTIVATIONS)])
@pytest.mark.parametrize("gate", [False, True])
def test_bias_activation_gate_and_residual(triton_device, dtype, activation, gate):
    torch.manual_seed(0)
    if gate and activation is None:
        return
    x = torch.randn(3, 2 * 37 if gate else 37).to(triton_device, dtype)
    bias = torch.randn(x.shape[1]).to(triton_device, dtype)
    residual = torch.randn(3, 50).to(triton_device, dtype)[:, 4:41]
    check(x, Epilogue(bias, activation, gate, residual))
    check(x, Epilogue(None, activation, gate, None))


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_rows_of_several_programs(triton_device, rows):
    x = torch.randn(rows, 2049, device=triton_device)
    check(x, Epilogue(torch.randn(2049, device=triton_device), "gelu", residual_TN=torch.randn_like(x)))


def test_the_product_is_overwritten(triton_device):
    x = torch.randn(3, 40, device=triton_device)
    assert finish_product(x, Epilogue(activation="relu")) is x
    assert (x >= 0).all()


def test_refusals():
    assert epilogue_refusal(torch.zeros(2, 4, dtype=torch.int8)) == "dtype is torch.int8"
    assert epilogue_refusal(torch.zeros(4, 2).T) == "they are no matrix of whole rows"
    assert epilogue_refusal(torch.zeros(2, 4)) == "device is cpu"
