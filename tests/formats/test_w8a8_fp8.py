from __future__ import annotations

import pytest
import torch

from paceline.formats import FORMATS, over, pack, w8a8_fp8
from paceline.formats.w8a8_fp8 import FEW_ROWS, W8A8Weight
from paceline.kernels.scaled_linear import round_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_are_multiplied_as_they_are_and_many_rounded(dtype):
    values, x, bias = torch.randn(48, 64), torch.randn(FEW_ROWS + 1, 64).to(dtype), torch.randn(48).to(dtype)
    weight, stored = (pack(values, format, dtype=dtype, device="cpu") for format in ("w8a8-fp8", "fp8"))
    assert torch.equal(weight.unpack(), stored.unpack())
    assert torch.equal(weight.matmul(x[:-1], bias), stored.matmul(x[:-1], bias))
    assert torch.equal(weight.matmul(x, bias), stored.matmul(round_rows(x), bias))
    exact = x.double() @ values.double().T + bias.double()
    few, many = ((weight.matmul(rows, bias).double() - exact[: len(rows)]).norm() for rows in (x[:-1], x))
    assert few < many < 2 * few  # either rounding has three bits
    assert not torch.equal(round_rows(x), x)


def test_the_memory_is_that_of_fp8():
    for size in ("stored_bytes", "packing_bytes", "unpack_bytes"):
        ours, plain = (getattr(FORMATS[name], size)(96, 64, torch.bfloat16) for name in ("w8a8-fp8", "fp8"))
        assert ours == plain
    assert w8a8_fp8.resident_bytes(96, 64, torch.bfloat16, CPU) == FORMATS["fp8"].resident_bytes(
        96, 64, torch.bfloat16, CPU
    )


def test_the_kernel_for_weights_as_stored_has_the_few_rows():
    weight = pack(torch.randn(16, 32), "w8a8-fp8", dtype=torch.bfloat16, device="cpu")
    assert weight.planes is not None
    assert weight.planes.most_rows == FEW_ROWS
    assert isinstance(over(weight, weight.planes), W8A8Weight)
    assert weight.route(FEW_ROWS)[0] == "unpacked, then torch's F.linear"
    assert weight.route(FEW_ROWS + 1) == ("rounded, unpacked, then torch's F.linear", "device is cpu")
