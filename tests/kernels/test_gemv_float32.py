"""Few rows in float32 against plain torch, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from paceline.kernels.gemv import PLAIN, Epilogue, gemv_ref
from paceline.kernels.gemv_float32 import float32_gemv, float32_refusal

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def check(x, weight, epilogue=PLAIN):
    torch.testing.assert_close(
        float32_gemv(x, weight, epilogue), gemv_ref(x, weight, None, epilogue), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("tokens", [1, 2, 3, 8])
@pytest.mark.parametrize(("rows", "columns"), [(40, 64), (7, 70), (1100, 33), (3, 5000)])
def test_any_shape(triton_device, tokens, rows, columns):
    x, weight = (torch.randn(shape).to(triton_device) for shape in ((tokens, columns), (rows, columns)))
    check(x, weight / columns**0.5)


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu", None])
@pytest.mark.parametrize("gated", [False, True])
def test_what_follows(triton_device, activation, gated):
    if gated and activation is None:
        pytest.skip("nothing gates by nothing")
    outputs = 20 if gated else 40
    shapes = (5, 64), (40, 64), (40,), (5, 60)
    x, weight, bias, residual = (torch.randn(shape).to(triton_device) for shape in shapes)
    for b in (None, bias):
        for r in (None, residual[:, 3 : 3 + outputs]):
            check(x[:, :64], weight / 8, Epilogue(b, activation, gated, r))


def test_rows_a_stride_apart(triton_device):
    x, weight = torch.randn(3, 90).to(triton_device)[:, 7:71], torch.randn(40, 64).to(triton_device)
    check(x, weight / 8)


def test_what_it_does_not_take():
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    assert float32_refusal(x, weight) is None
    assert "9 rows" in str(float32_refusal(torch.randn(9, 8), weight))
    assert "float16" in str(float32_refusal(x.half(), weight))
    assert "float16" in str(float32_refusal(x, weight.half()))
    assert "x has gaps" in str(float32_refusal(torch.randn(8, 3).t(), weight))
    assert "weight has gaps" in str(float32_refusal(x, torch.randn(8, 4).t()))
