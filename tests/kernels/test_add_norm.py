"""Sum and norm in one kernel against plain torch: in Triton's interpreter on a CPU, on a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paceline.kernels.add_norm import (
    NormWeights,
    add_norm,
    add_norm_,
    add_norm_ref,
    in_place_refusal,
    scaled_add_norm_,
)
from paceline.kernels.norm import norm_rows, scaled_norm_rows

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them
# The interpreter cuts bfloat16 off where the GPU rounds.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


def random_norm(channels: int, device: str, dtype: torch.dtype, *, centred: bool = True) -> NormWeights:
    weight, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    return NormWeights(weight.to(device, dtype), bias.to(device, dtype), 1e-5, centred)


def widened(norm: NormWeights) -> NormWeights:
    weight, bias = norm.weight_C, norm.bias_C
    return replace(
        norm, weight_C=None if weight is None else weight.double(), bias_C=None if bias is None else bias.double()
    )


def check(x, norm, residual=None, bias=None):
    def wide(t):
        return None if t is None else t.double()

    exact = add_norm_ref(x.double(), widened(norm), residual_TC=wide(residual), bias_C=wide(bias))
    plain = add_norm_ref(x, norm, residual_TC=residual, bias_C=bias)
    found = add_norm(x, norm, residual_TC=residual, bias_C=bias, keep_sum=True)
    for ours, torchs, right in zip(found, plain, exact, strict=True):
        assert ours.dtype == x.dtype
        assert ours.shape == x.shape
        # In float32 both are a few units in the last place of the sum.
        assert (ours - right).norm() <= 2 * (torchs - right).norm() + 1e-6 * right.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (1, 64), (3, 100), (2, 768), (2, 4097)])
@pytest.mark.parametrize("centred", [True, False])
def test_errs_no_more_than_twice_plain_torch(triton_device, rows, channels, centred, dtype):
    torch.manual_seed(0)
    x, residual = ((torch.randn(rows, channels) * 3 + 1).to(triton_device, dtype) for _ in range(2))
    bias = torch.randn(channels).to(triton_device, dtype)
    check(x, random_norm(channels, triton_device, dtype, centred=centred), residual, bias)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("without", ["weight_C", "bias_C", "both"])
def test_weight_and_bias_are_optional(triton_device, without, centred):
    norm = random_norm(100, triton_device, torch.float32, centred=centred)
    norm = replace(norm, **dict.fromkeys(["weight_C", "bias_C"] if without == "both" else [without]))
    check(torch.randn(3, 100, device=triton_device), norm, torch.randn(3, 100, device=triton_device))


def test_what_is_added_is_optional_and_rows_lie_a_stride_apart(triton_device):
    norm = random_norm(100, triton_device, torch.float32)
    x, residual = torch.randn(4, 600, device=triton_device).split([300, 300], dim=1)
    x, residual = x[:, 50:150], residual[:, 7:107]
    bias = torch.randn(100, device=triton_device)
    check(x, norm, residual, bias)
    check(x, norm, residual)
    check(x, norm, None, bias)
    check(x, norm)
    assert add_norm(x, norm, residual_TC=residual)[1] is None


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_of_a_split_product_are_added_first(triton_device, parts):
    torch.manual_seed(0)
    norm = random_norm(48, triton_device, torch.float16)
    x_PTC = torch.randn(parts, 5, 48, device=triton_device)
    residual = torch.randn(5, 48, device=triton_device).half()
    y, total = add_norm(x_PTC, norm, residual_TC=residual, keep_sum=True, dtype=torch.float16)
    exact = add_norm_ref(x_PTC.sum(0).double(), widened(norm), residual_TC=residual.double())
    assert y.dtype == total.dtype == torch.float16
    torch.testing.assert_close(y.double(), exact[0], rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(total.double(), exact[1], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [40, 576, 4097])
@pytest.mark.parametrize("centred", [True, False])
def test_a_sum_is_normed_as_it_is_stored(triton_device, channels, centred, dtype):
    """To the bit as an addition and a norm after it, wherever the results lie."""
    torch.manual_seed(0)
    x, residual = ((torch.randn(7, channels) * scale).to(triton_device, dtype) for scale in (1, 30))
    norm = random_norm(channels, triton_device, dtype, centred=centred)
    added, arguments = residual + x, (norm.weight_C, norm.bias_C, norm.eps)
    normed = norm_rows(added, *arguments, centred=centred)
    y, total = add_norm(x, norm, residual_TC=residual, keep_sum=True)
    assert torch.equal(y, normed)
    assert torch.equal(total, added)
    assert torch.equal(add_norm(x, norm, residual_TC=residual)[0], normed)

    half, stream = x.clone(), residual.clone()
    scaled = scaled_add_norm_(half, norm, stream)
    expected = scaled_norm_rows(added, *arguments, centred=centred)
    assert torch.equal(scaled.q_TK.view(torch.uint8), expected.q_TK.view(torch.uint8))
    assert torch.equal(scaled.scale_T1, expected.scale_T1)
    assert torch.equal(stream, added)
    assert torch.equal(half, x)
    add_norm_(half, norm, residual)
    assert torch.equal(half, normed)
    assert torch.equal(residual, added)


def test_in_place_rows_lie_one_after_the_other(monkeypatch):
    assert in_place_refusal(torch.ones(3, 8)) == "device is cpu"
    monkeypatch.setattr("paceline.kernels.norm.triton_refusal", lambda device, dtype: None)
    assert in_place_refusal(torch.ones(3, 8)) is None
    assert in_place_refusal(torch.ones(3, 9)[:, :8]) == "rows are a stride apart"
    assert in_place_refusal(torch.ones(3, 8).double()) == "dtype is torch.float64"


def test_no_rows_give_no_rows(triton_device):
    x, norm = torch.empty(0, 64, device=triton_device), random_norm(64, triton_device, torch.float32)
    y, total = add_norm(x, norm, residual_TC=x, keep_sum=True)
    assert y.shape == total.shape == (0, 64)
    add_norm_(x, norm, x.clone())
    assert scaled_add_norm_(x, norm, x.clone()).shape == (0, 64)
