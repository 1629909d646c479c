"""GELU of a product by one kernel against plain torch, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from paceline.kernels import cuda_linear as whole
from paceline.kernels import gelu_linear as module
from paceline.kernels.gelu_linear import gelu_linear, gelu_refusal, gelu_shape_refusal
from paceline.kernels.gemv import Epilogue, Planes
from paceline.kernels.gpu import GPU, gpu

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them
DTYPES = [torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
HOPPER = GPU("", 8, (9, 0))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device(triton_device: str) -> str:
    if triton_device == "cuda" and not gpu(torch.device("cuda")).dependent:
        pytest.skip("loads by descriptor need compute capability 9.0")
    return triton_device


def given(T, N, K, device, dtype=torch.float16):
    shapes = (T, K), (N, K), (N,)
    x, weight, bias = (torch.randn(shape).to(device, dtype) for shape in shapes)
    return x, weight / K**0.5, bias


def assert_as_exact(found, x, weight, bias):
    """At most a twentieth more error than torch's, which rounds before GELU and after it."""
    exact = F.gelu(F.linear(x.double(), weight.double(), None if bias is None else bias.double()))
    plain = F.gelu(F.linear(x, weight, bias))
    assert found.dtype == x.dtype
    assert (found.double() - exact).norm() <= 1.05 * (plain.double() - exact).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "N", "K"), [(1, 8, 8), (129, 264, 72), (40, 512, 200), (1200, 24, 64)])
@pytest.mark.parametrize("biased", [True, False])
def test_any_shape(device, dtype, T, N, K, biased):
    x, weight, bias = given(T, N, K, device, dtype)
    bias = bias if biased else None
    assert gelu_shape_refusal(x, weight) is None
    assert_as_exact(gelu_linear(x, weight, bias), x, weight, bias)


def test_the_polynomial_everywhere(device):
    """From -12 to 12 the error beside rounding is below 5e-5, or 1e-5 of the number."""
    x = torch.eye(8, dtype=torch.float16, device=device)
    bias = torch.linspace(-12, 12, 8 * 512, device=device).half()
    found = gelu_linear(x, torch.zeros(8 * 512, 8, dtype=torch.float16, device=device), bias)[0].double()
    exact = F.gelu(bias.double())
    assert ((found - exact).abs() - exact.abs() * (2**-11 + 1e-5)).max() < 5e-5


def test_what_is_no_number_stays_none(device):
    x, weight, bias = given(3, 16, 24, device)
    x[1, 5] = torch.nan
    assert gelu_linear(x, weight, bias).isnan().all(dim=1).tolist() == [False, True, False]


def test_rows_a_stride_apart(device):
    x, weight, bias = given(5, 16, 64, device)
    wide = torch.cat((torch.full_like(x, torch.nan), x), dim=1)
    assert_as_exact(gelu_linear(wide[:, 64:], weight, bias), x, weight, bias)


def test_no_rows():
    assert gelu_linear(*given(0, 16, 8, "cpu")).shape == (0, 16)


def test_what_it_does_not_take(monkeypatch):
    x, weight, _ = given(9, 16, 24, "cpu")
    assert gelu_shape_refusal(x, weight) is None
    assert "float32" in str(gelu_shape_refusal(x.float(), weight.float()))
    assert "16 bytes" in str(gelu_shape_refusal(x[:, :12].contiguous(), weight[:, :12].contiguous()))
    assert "16 bytes" in str(gelu_shape_refusal(x[:, 1:9], weight))
    assert "multiple of 8" in str(gelu_shape_refusal(x, weight[:10]))
    monkeypatch.setattr(module, "gpu", lambda device: HOPPER)
    assert "fewer than" in str(gelu_refusal(x, weight))
    monkeypatch.setattr(module, "FEWEST_OUTPUTS", 1)
    assert gelu_refusal(x, weight) is None
    monkeypatch.setattr(module, "gpu", lambda device: GPU("", 8, (8, 0)))
    assert "9.0" in str(gelu_refusal(x, weight))


@pytest.mark.parametrize("epilogue", ["gelu", "gelu and residual", "gate", "silu"])
def test_where_it_is_used(device, epilogue, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "FEWEST_OUTPUTS", 1)
    monkeypatch.setattr(module, "gpu", lambda device: HOPPER if device.type == "cpu" else gpu(device))
    if device == "cpu":
        monkeypatch.setattr(HOPPER.__class__, "dependent", False)
        monkeypatch.setattr(whole, "gelu_refusal", gelu_shape_refusal)
    monkeypatch.setattr(whole, "gelu_linear", lambda *args: seen.append(args) or gelu_linear(*args))
    monkeypatch.setattr(whole, "SMALL_ROWS", 4)
    x, weight, bias = given(9, 16, 24, device)
    gated = epilogue == "gate"
    residual = torch.randn(9, 16).to(x) if epilogue == "gelu and residual" else None
    activation = "silu" if epilogue == "silu" else "gelu"
    whole.cuda_linear(x, Planes("dense", (16, 24), weight), Epilogue(bias, activation, gated, residual))
    assert bool(seen) == (epilogue == "gelu")
