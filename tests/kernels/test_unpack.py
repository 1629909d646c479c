"""Writing a packed weight out by a kernel, in Triton's interpreter where there is no GPU, against the definitions."""

from __future__ import annotations

import pytest
import torch

from paceline.formats import fp8, int4, int8
from paceline.kernels.gemv import Planes
from paceline.kernels.unpack import unpack_planes, unpack_refusal

pytest.importorskip("triton", reason="the kernels are Triton's")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(5, 20), (70, 1036)])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_bytes_times_their_scale_rounded_once(kind: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = {"int8": int8, "fp8": fp8}[kind].pack(torch.randn(rows, columns, device=DEVICE).to(dtype))
    expected_NK = (weight.q_NK.float() * weight.scale_N[:, None]).to(dtype)
    assert torch.equal(unpack_planes(weight.planes, slice(None), dtype), expected_NK)
    assert torch.equal(unpack_planes(weight.planes, slice(2, 4), dtype), expected_NK[2:4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("rows", "columns"), [(5, 36), (40, 1100)])
def test_int4_as_its_format_unpacks_it(rows: int, columns: int, group: int, dtype: torch.dtype) -> None:
    q_NP, scale_offset = int4.quantize(torch.randn(rows, columns, device=DEVICE).to(dtype), group)
    weight = int4.Int4Weight(int4.pack_words(q_NP, group), scale_offset, group, (rows, columns), dtype)
    scale_NP, offset_NP = scale_offset.float().repeat_interleave(group, 1).unbind(2)
    exact_NK = ((q_NP.float() - 8) * scale_NP + offset_NP)[:, :columns]
    found_NK = unpack_planes(weight.planes, slice(1, None), dtype)
    # On a GPU bfloat16 is rounded once, elsewhere by way of float32.
    torch.testing.assert_close(found_NK, exact_NK[1:].to(dtype), rtol=2**-7 if DEVICE == "cuda" else 0, atol=0)


def test_refusals() -> None:
    planes = Planes("int8", (4, 8), torch.zeros(4, 2, dtype=torch.int32), torch.ones(4))
    cpu = torch.device("cpu")
    assert unpack_refusal(planes, torch.float16, cpu) == "device is cpu"
    assert unpack_refusal(planes, torch.float32, cpu) == "dtype is torch.float32"
    assert unpack_refusal(None, torch.float16, cpu) == "its columns are no whole words"
    assert unpack_refusal(Planes("dense", (4, 8), torch.zeros(4, 8)), torch.float32, cpu) == "dense is not packed"
