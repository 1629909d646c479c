"""The norm kernel against its plain twins: in Triton's interpreter on a CPU, on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from paceline.kernels.norm import (
    layer_norm,
    norm_refusal,
    norm_rows,
    norm_shape_refusal,
    rms_norm,
)

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them
# The interpreter cuts bfloat16 off where the GPU rounds.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, centred: bool) -> torch.Tensor:
    return layer_norm(x, weight, bias, 1e-5) if centred else rms_norm(x, weight, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (1, 64), (3, 100), (2, 576), (5, 4097), (1, 16384)])
@pytest.mark.parametrize(("centred", "biased"), [(False, False), (True, False), (True, True)])
def test_errs_no_more_than_twice_plain_torch(triton_device, rows, channels, centred, biased, dtype):
    torch.manual_seed(0)
    x = (torch.randn(rows, channels) * 3 + 1).to(triton_device, dtype)
    weight = (torch.rand(channels) + 0.5).to(triton_device, dtype)
    bias = torch.randn(channels).to(triton_device, dtype) if biased else None
    exact = plain(x.double(), weight.double(), None if bias is None else bias.double(), centred=centred)
    error = (norm_rows(x, weight, bias, 1e-5, centred=centred) - exact).norm()
    # In float32 both are a few units in the last place of the sum.
    allowed = 2 * (plain(x, weight, bias, centred=centred) - exact).norm() + 1e-6 * exact.norm()
    assert error <= allowed


def test_rows_lie_a_stride_apart(triton_device):
    wide = torch.randn(4, 300, device=triton_device)
    x, weight = wide[:, 50:150], torch.rand(100, device=triton_device)
    torch.testing.assert_close(norm_rows(x, weight, None, 1e-6, centred=False), rms_norm(x, weight, 1e-6))


def test_an_rms_norm_may_have_a_bias(triton_device):
    x, weight, bias = (torch.randn(shape, device=triton_device) for shape in ((2, 48), (48,), (48,)))
    torch.testing.assert_close(norm_rows(x, weight, bias, 1e-6, centred=False), rms_norm(x, weight, 1e-6) + bias)


def test_no_rows_give_no_rows(triton_device):
    x = torch.empty(0, 64, device=triton_device)
    assert norm_rows(x, torch.ones(64, device=triton_device), None, 1e-6, centred=True).shape == (0, 64)


def test_refusals():
    assert norm_refusal(torch.zeros(1, 8)) == "device is cpu"
    assert norm_shape_refusal(torch.zeros(1, 8, dtype=torch.float64)) == "dtype is torch.float64"
    assert norm_shape_refusal(torch.zeros(1, 16385)) == "16385 channels, and the kernel takes 16384"
    assert norm_shape_refusal(torch.zeros(8, 2).T) == "x is no matrix of whole rows"
    assert norm_shape_refusal(torch.zeros(1, 8)) is None
