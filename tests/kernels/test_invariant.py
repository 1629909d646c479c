"""Products and activations whose rows do not depend on how many there are; without a GPU in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from paceline.kernels import invariant as module
from paceline.kernels.activation import activate, gated
from paceline.kernels.gpu import GPU
from paceline.kernels.invariant import (
    PRODUCT_ROWS,
    InvariantLaunch,
    by_rows,
    default_launch,
    invariant_linear,
    invariant_refusal,
    positions_refusal,
    row_by_row,
)

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them
# The interpreter's products of bfloat16 are none.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])

SMALL = InvariantLaunch(t_tile=32, n_tile=32, k_tile=16, pieces=4, stages=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "N", "K"), [(1, 5, 7), (70, 130, 100), (3, 128, 64), (65, 64, 128)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_kernel_errs_no_more_than_twice_plain_torch(triton_device, dtype, tokens, N, K, biased):
    torch.manual_seed(0)
    x, w, bias = (torch.randn(shape).to(triton_device, dtype) for shape in ((tokens, K), (N, K), (N,)))
    bias = bias if biased else None
    exact = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    found = invariant_linear(x, w, bias)
    assert found.dtype == dtype
    assert (found - exact).norm() <= 2 * (F.linear(x, w, bias) - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_the_kernel_is_the_same_in_any_company(triton_device, dtype):
    torch.manual_seed(0)
    x, w, bias = (torch.randn(shape).to(triton_device, dtype) for shape in ((150, 100), (90, 100), (90,)))
    together = invariant_linear(x, w, bias, SMALL)
    for first, end in ((0, 1), (7, 39), (149, 150), (20, 150)):
        assert torch.equal(invariant_linear(x[first:end], w, bias, SMALL), together[first:end])


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_pieces_of_k_in_few_programs_and_in_many(triton_device, pieces):
    """7 tiles of K: 4 pieces of 2, the last of them half empty. 1 row takes a program a piece, 90 rows do not."""
    torch.manual_seed(0)
    x, w, bias = (torch.randn(shape, device=triton_device) for shape in ((90, 100), (90, 100), (90,)))
    for some in (x[:1], x):
        found = invariant_linear(some, w, bias, replace(SMALL, pieces=pieces))
        torch.testing.assert_close(found, F.linear(some, w, bias), rtol=1e-5, atol=1e-5)


def test_launches_follow_the_weight(monkeypatch):
    monkeypatch.setattr(module, "gpu", lambda device: GPU("NVIDIA H100", 132, (9, 0)))
    cuda = torch.device("cuda")
    pieces = [default_launch(N, K, 2, cuda).pieces for N, K in ((6144, 4096), (4096, 4096), (28672, 4096), (64, 576))]
    assert pieces == [4, 8, 1, 2]
    assert default_launch(4096, 4096, 4, cuda) == InvariantLaunch(32, 32, 32, 2, 4)


def test_rows_lie_a_stride_apart_and_none_are_none(triton_device):
    wide, w = torch.randn(5, 60, device=triton_device), torch.randn(9, 20, device=triton_device)
    torch.testing.assert_close(invariant_linear(wide[:, 10:30], w), wide[:, 10:30] @ w.T, rtol=1e-5, atol=1e-5)
    assert invariant_linear(wide[:0, 10:30], w).shape == (0, 9)


@pytest.mark.parametrize("tokens", [1, 8, 21])
def test_a_product_by_rows_has_one_shape(tokens):
    shapes = []

    def product(x_RK):
        shapes.append(tuple(x_RK.shape))
        return x_RK @ torch.arange(6.0).view(3, 2)

    x_TK = torch.randn(tokens, 3)
    torch.testing.assert_close(by_rows(product, x_TK), x_TK @ torch.arange(6.0).view(3, 2))
    assert set(shapes) == {(PRODUCT_ROWS["cpu"], 3)}


def test_a_product_that_treats_rows_unlike_is_refused():
    like = torch.empty(0)
    assert positions_refusal(lambda x_RK: x_RK * 2, 5, like) is None

    def uneven(x_RK):
        return torch.cat((x_RK[:6] * 2, x_RK[6:] * 2.0001))

    assert positions_refusal(uneven, 5, like) == "2 of 8 equal rows come out different"


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("function", [gated, activate])
def test_an_activation_row_by_row(function, name):
    x_TC = torch.randn(5, 38)
    whole = row_by_row(function)(x_TC, name)
    torch.testing.assert_close(whole, function(x_TC, name))
    for row in range(5):
        assert torch.equal(row_by_row(function)(x_TC[row : row + 1], name)[0], whole[row])


def test_refusals():
    assert invariant_refusal(torch.float32, torch.device("cpu")) == "device is cpu"
    assert invariant_refusal(torch.float64, torch.device("cuda")) == "dtype is torch.float64"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(6144, 4096), (4096, 14336), (1000, 576)])
def test_rows_on_a_gpu_at_the_sizes_of_models(dtype, N, K):
    torch.manual_seed(0)
    x, w = torch.randn(600, K, device="cuda").to(dtype), (torch.randn(N, K, device="cuda") / K**0.5).to(dtype)
    together = invariant_linear(x, w)
    exact = F.linear(x.double(), w.double())
    assert (together - exact).norm() <= 2 * (F.linear(x, w) - exact).norm() + 1e-6 * exact.norm()
    for first, end in ((0, 1), (599, 600), (3, 7), (100, 420)):
        assert torch.equal(invariant_linear(x[first:end], w), together[first:end])
