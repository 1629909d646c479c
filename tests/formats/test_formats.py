from __future__ import annotations

import pytest
import torch

from paceline.errors import UsageError
from paceline.formats import pack
from paceline.formats.dense import DenseWeight, OneDNNWeight
from paceline.formats.int8 import MAX_PACKED_ROWS
from paceline.kernels.linear import linear_ref

SHAPES = [(16, 16), (33, 70), (129, 64), (8, 300), (960, 576)]
ROWS = [1, 2, 5, MAX_PACKED_ROWS, MAX_PACKED_ROWS + 1, 40]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
def test_dense_equals_the_plain_product(shape, rows, bias):
    values, x = torch.randn(shape), torch.randn(rows, shape[1])
    b = torch.randn(shape[0]) if bias else None
    weight = pack(values, "dense", dtype=torch.float32, device="cpu")
    torch.testing.assert_close(weight.matmul(x, b), linear_ref(x, values, b), rtol=1e-4, atol=1e-4)
    assert weight.shape == shape
    assert weight.nbytes == values.nbytes
    assert torch.equal(weight.unpack(), values)


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_bfloat16_loses_no_more_than_plain_torch(shape):
    values, x = torch.randn(shape).bfloat16(), torch.randn(5, shape[1]).bfloat16()
    exact = linear_ref(x.double(), values.double())
    plain = (linear_ref(x, values).double() - exact).norm()
    packed = (pack(values, "dense", dtype=torch.bfloat16, device="cpu").matmul(x).double() - exact).norm()
    assert packed <= 2 * plain


def test_cpu_weights_are_packed_for_onednn():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    assert isinstance(pack(torch.randn(64, 64), "dense", dtype=torch.float32, device="cpu"), OneDNNWeight)
    assert isinstance(pack(torch.randn(4, 64), "dense", dtype=torch.float32, device="cpu"), DenseWeight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_multiplies_by_its_own_values(shape, rows, dtype):
    """Against the unpacked weight in float64: the error is bf16's, whichever path the row count takes."""
    values, x = torch.randn(shape), torch.randn(rows, shape[1]).to(dtype)
    weight = pack(values, "int8", dtype=dtype, device="cpu")
    exact = x.double() @ weight.q_NK.double().T * weight.scale_N.double()
    error = (weight.matmul(x).double() - exact).norm() / exact.norm()
    assert error < 2**-7
    assert weight.matmul(x).dtype == dtype


def test_int8_rounds_to_the_nearest_of_255_levels():
    values = torch.randn(50, 40)
    weight = pack(values, "int8", dtype=torch.float32, device="cpu")
    step = values.abs().amax(1, keepdim=True) / 127
    assert ((weight.unpack() - values).abs() <= step / 2 + 1e-6).all()
    assert weight.nbytes == 50 * 40 + 4 * 50


def test_int8_row_of_zeros_stays_zero():
    weight = pack(torch.zeros(3, 16), "int8", dtype=torch.float32, device="cpu")
    assert torch.equal(weight.unpack(), torch.zeros(3, 16))


def test_unknown_format_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'int8'"):
        pack(torch.zeros(2, 2), "int88", dtype=torch.float32, device="cpu")
