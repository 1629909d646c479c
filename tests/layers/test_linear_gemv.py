"""A linear through the GEMV kernels, in Triton's interpreter where there is no GPU, against its plain twin."""

from __future__ import annotations

import os

import pytest
import torch

from paceline import formats
from paceline.config import NormConfig
from paceline.kernels.gemv import shape_refusal
from paceline.layers import linear as module
from paceline.layers.linear import Linear
from paceline.layers.norm import Norm

# The interpreter takes the place of the compiler when triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
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
