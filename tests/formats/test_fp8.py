from __future__ import annotations

import pytest
import torch

from paceline.formats import fp8, pack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0])
def test_values_are_off_by_at_most_half_a_step_of_three_bits(dtype, size):
    """2^-4 of the value, or half of the smallest step near zero; and what the dtype itself rounds. Rows of 1e-4 have
    scales of 2e-7, which float16 could not hold."""
    values = (torch.randn(33, 70) * size).to(dtype)
    found = pack(values, "fp8", dtype=dtype, device="cpu").unpack()
    scale = values.float().abs().amax(1, keepdim=True) / 448
    assert found.dtype == dtype
    limit = values.float().abs() * (2**-4 + 3 * torch.finfo(dtype).eps) + scale * 2**-10
    if dtype == torch.float16:
        limit = limit + 2**-24
    assert ((found.float() - values.float()).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 5, 40])
@pytest.mark.parametrize("shape", [(16, 16), (33, 70), (1, 300)])
def test_products_are_those_of_the_unpacked_weight(shape, rows, dtype):
    x, bias = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    weight = pack(torch.randn(shape), "fp8", dtype=dtype, device="cpu")
    exact = x.double() @ weight.unpack().double().T + bias.double()
    found = weight.matmul(x, bias)
    assert (found.dtype, found.shape) == (dtype, exact.shape)
    if rows:
        assert (found.double() - exact).norm() < 2**-7 * exact.norm()


def test_the_largest_value_of_a_row_is_kept_and_zeros_stay():
    values = torch.randn(200, 64) * 10 ** torch.linspace(-3, 3, 200)[:, None]
    values[7] = 0
    weight = pack(values, "fp8", dtype=torch.float32, device="cpu")
    assert weight.unpack().isfinite().all()
    torch.testing.assert_close(weight.unpack().abs().amax(1), values.abs().amax(1))
    assert weight.nbytes == 200 * (64 + 4)


def test_moving_bits_is_the_cast():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    every = every[every.float().isfinite()]
    assert every.numel() == 254
    assert torch.equal(fp8._shifted(every).float(), every.float() * 2**-8)
