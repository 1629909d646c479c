"""A linear through the kernels, in Triton's interpreter where there is no GPU, against its plain twin."""

from __future__ import annotations

import pytest
import torch

from paceline import formats
from paceline.config import NormConfig
from paceline.formats import w8a8_fp8
from paceline.kernels.gated import gated_rows
from paceline.kernels.gemv import shape_refusal
from paceline.layers import linear as module
from paceline.layers.linear import Linear
from paceline.layers.mlp import GatedMLP
from paceline.layers.norm import Norm

pytest.importorskip("triton", reason="the kernels are Triton's")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("below", [0, 10_000])
def test_its_norm_is_the_same_inside_the_product_and_before_it(monkeypatch, kind, rows, below):
    """An RMS norm of one row goes inside where the weight is small, everything else before."""
    monkeypatch.setattr(module, "gemv_refusal", shape_refusal)
    monkeypatch.setattr("paceline.kernels.gemv.FUSED_NORM", below)
    torch.manual_seed(0)
    weight = formats.pack(torch.randn(24, 96).half(), "int8", dtype=torch.float16, device=DEVICE)
    linear = Linear(weight, torch.randn(24).half().to(DEVICE))
    norm = Norm(NormConfig(kind=kind, eps=1e-5), torch.rand(96).half().to(DEVICE) + 0.5)
    x_TK, residual_TN = torch.randn(rows, 96).half().to(DEVICE), torch.randn(rows, 12).half().to(DEVICE)
    arguments = {"norm": norm, "activation": "silu", "gated": True, "residual_TN": residual_TN}
    asked = []
    run = module.gemv
    monkeypatch.setattr(module, "gemv", lambda *args, **kwargs: asked.append(kwargs["norm"]) or run(*args, **kwargs))
    found_TN, expected_TN = linear(x_TK, **arguments), linear.plain(x_TK, **arguments)
    assert (found_TN - expected_TN).float().norm() < 1e-2 * expected_TN.float().norm()  # float16, rounded thrice
    assert (asked[0] is not None) == (kind == "rms" and rows == 1 and below > 0)


@pytest.mark.parametrize("format", ["dense", "int8", "w8a8-fp8"])
def test_it_adds_residuals_of_the_rows_that_its_kernel_takes(monkeypatch, format):
    dtype = torch.bfloat16
    linear = Linear(formats.pack(torch.randn(12, 16), format, dtype=dtype, device=DEVICE))  # too small for oneDNN
    most = linear.weight.planes.most_rows
    rows = [torch.ones(count, 12, dtype=dtype, device=DEVICE) for count in (most, most + 1)]
    assert [linear.adds(residual_TN) for residual_TN in rows] == [DEVICE == "cuda", False]
    monkeypatch.setattr(module, "gemv_refusal", shape_refusal)
    assert [linear.adds(residual_TN) for residual_TN in rows] == [True, False]


def multiply(x, q_NK, scale_N, bias_N=None):
    """scaled_linear where nothing multiplies fp8."""
    return (x.q_TK.float() @ q_NK.float().T * x.scale_T1 * scale_N).bfloat16()


@pytest.mark.parametrize("rows", [w8a8_fp8.FEW_ROWS, w8a8_fp8.FEW_ROWS + 1])
def test_norm_and_gated_activation_give_a_product_its_rows_in_fp8(monkeypatch, rows):
    if DEVICE == "cpu":
        monkeypatch.setattr(w8a8_fp8, "scaled_refusal", lambda *_: None)
        monkeypatch.setattr(w8a8_fp8, "scaled_linear", multiply)
    torch.manual_seed(0)

    def linear(outputs, inputs):
        weight = formats.pack(torch.randn(outputs, inputs), "w8a8-fp8", dtype=torch.bfloat16, device=DEVICE)
        return Linear(weight)

    mlp = GatedMLP("silu", linear(64, 48), linear(48, 32))
    norm = Norm(NormConfig(eps=1e-5), torch.rand(48).bfloat16().to(DEVICE) + 0.5)
    x_TD = torch.randn(rows, 48).bfloat16().to(DEVICE)
    rounded = []
    quantize = w8a8_fp8.quantize_rows
    monkeypatch.setattr(w8a8_fp8, "quantize_rows", lambda x_TK: rounded.append(x_TK) or quantize(x_TK))
    found_TD = mlp(x_TD, norm=norm, residual_TD=x_TD)
    assert not rounded
    if rows > w8a8_fp8.FEW_ROWS:
        inner_TF = gated_rows(mlp.gate_up.weight.matmul(norm(x_TD)), "silu")
        assert torch.equal(found_TD, mlp.down.weight.matmul(inner_TF) + x_TD)
        assert len(rounded) == 2
