"""Products in fp8: rows are rounded in Triton's interpreter on a CPU, multiplied on a GPU alone."""

from __future__ import annotations

import pytest
import torch

from paceline.formats import pack
from paceline.kernels import gated as gated_module
from paceline.kernels import gpu as module
from paceline.kernels import scaled_linear as scaled
from paceline.kernels.gated import gated_rows, scaled_gated_rows
from paceline.kernels.gpu import GPU
from paceline.kernels.norm import norm_rows, scaled_norm_rows
from paceline.kernels.scaled_linear import (
    ScaledRows,
    quantize_rows,
    quantize_rows_ref,
    round_rows,
    scaled_linear,
    scaled_refusal,
)

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them
# The interpreter cuts bfloat16 off where the GPU rounds.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 16, 300])
def test_rows_are_off_by_half_a_step_of_three_bits(triton_device, dtype, columns):
    sizes = 10.0 ** torch.arange(-2, 3)[:, None]
    x = (torch.randn(5, columns + 9) * sizes).to(triton_device, dtype)[:, 4:-5]
    x[3] = 0
    q_TK, scale_T1 = quantize_rows_ref(x)
    limit = x.float().abs() * 2**-4 + scale_T1 * 2**-10
    assert ((q_TK.float() * scale_T1 - x.float()).abs() <= limit * 1.001).all()
    torch.testing.assert_close((q_TK.float() * scale_T1).abs().amax(1), x.float().abs().amax(1))
    assert not q_TK[3].float().any()

    found_TK, found_T1 = quantize_rows(x)
    assert found_TK.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(found_T1, scale_T1)
    carried = torch.zeros_like(found_TK, dtype=torch.bool)
    if not torch.cuda.is_available():  # the interpreter forgets the carry into the exponent
        carried = found_TK.float() * 2 == q_TK.float()
    torch.testing.assert_close(found_TK.float()[~carried], q_TK.float()[~carried], rtol=2**-3, atol=2**-9)
    assert carried.float().mean() < 0.3  # a row of zeros, too


def same(found: ScaledRows, expected: ScaledRows) -> bool:
    return torch.equal(found.q_TK.view(torch.uint8), expected.q_TK.view(torch.uint8)) and torch.equal(
        found.scale_T1, expected.scale_T1
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [40, 4097])
@pytest.mark.parametrize("centred", [False, True])
def test_a_norm_rounds_as_it_would_be_rounded_after_it(triton_device, dtype, channels, centred):
    x = (torch.randn(3, channels + 9) * 3).to(triton_device, dtype)[:, 4:-5]
    weight, bias = torch.randn(2, channels, device=triton_device).to(dtype)
    arguments = (x, weight, bias if centred else None, 1e-5)
    after = quantize_rows(norm_rows(*arguments, centred=centred))
    assert same(scaled_norm_rows(*arguments, centred=centred), after)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [40, 2049, gated_module.MOST_CHANNELS + 1])
def test_a_gated_activation_rounds_as_it_would_be_rounded_after_it(triton_device, dtype, channels):
    x = torch.randn(2, 2 * channels + 9).to(triton_device, dtype)[:, 4:-5]
    assert same(scaled_gated_rows(x, "silu"), quantize_rows(gated_rows(x, "silu")))


def test_no_rows_are_none(triton_device):
    q_TK, scale_T1 = quantize_rows(torch.zeros(0, 8, device=triton_device))
    assert (q_TK.shape, scale_T1.shape) == ((0, 8), (0, 1))
    none = torch.zeros(0, 8, device=triton_device)
    assert scaled_norm_rows(none, none.new_ones(8), None, 1e-5, centred=False).q_TK.shape == (0, 8)
    assert scaled_gated_rows(none, "silu").scale_T1.shape == (0, 1)


@pytest.mark.parametrize(
    ("gpu", "shape", "dtype", "reason"),
    [
        (GPU("H100", 132, (9, 0)), (64, 128), torch.bfloat16, None),
        (GPU("H100", 132, (9, 0)), (64, 128), torch.float16, "dtype is torch.float16"),
        (GPU("H100", 132, (9, 0)), (64, 120), torch.bfloat16, "64 x 120 are no multiples of 16"),
        (GPU("H100", 132, (9, 0)), (64, 1 << 16), torch.bfloat16, "65536 columns, and the kernel takes 32768"),
        (GPU("A100", 108, (8, 0)), (64, 128), torch.bfloat16, "compute capability 9.0 on"),
        (GPU("MI300", 304), (64, 128), torch.bfloat16, "compute capability 9.0 on"),
        (GPU("H100", 132, (9, 0), "Triton is not installed"), (64, 128), torch.bfloat16, "Triton is not installed"),
    ],
)
def test_refusals(gpu, shape, dtype, reason, monkeypatch):
    for where in (module, scaled):
        monkeypatch.setattr(where, "gpu", lambda device: gpu)
    found = scaled_refusal(shape, dtype, CUDA)
    assert found is None if reason is None else reason in (found or "")
    assert scaled_refusal(shape, dtype, torch.device("cpu")) == "device is cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [65, 100, 2048])
@pytest.mark.parametrize("bias", [False, True])
def test_products_on_a_gpu(tokens, bias):
    x_TK = torch.randn(tokens, 512, device="cuda").bfloat16()
    bias_N = torch.randn(384, device="cuda").bfloat16() if bias else None
    weight = pack(torch.randn(384, 512), "w8a8-fp8", dtype=torch.bfloat16, device="cuda")
    assert scaled_refusal(weight.shape, torch.bfloat16, CUDA) is None
    q_TK, scale_T1 = quantize_rows_ref(x_TK)
    exact = (q_TK.double() * scale_T1) @ (weight.q_NK.double() * weight.scale_N[:, None]).T
    exact = exact if bias_N is None else exact + bias_N.double()
    found = scaled_linear(quantize_rows(x_TK), weight.q_NK, weight.scale_N, bias_N)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() < 2**-7 * exact.norm()
    rounded = round_rows(x_TK).double() @ weight.unpack().double().T
    assert (found.double() - (bias_N.double() if bias else 0) - rounded).norm() < 2**-6 * exact.norm()
