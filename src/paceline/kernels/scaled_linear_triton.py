# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton side of kernels/scaled_linear.py: rows of x to fp8, one program a row. TILE is K padded to a power of
two."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.kernels import scaled_linear

MOST = tl.constexpr(scaled_linear.MOST)
SMALLEST = tl.constexpr(scaled_linear.SMALLEST)


@triton.jit
def store_scaled(x, q_ptr, scale_ptr, row, cols, K):
    """A whole row in fp8 and its scale; `x` in float32, 0 from K on."""
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 0), SMALLEST), MOST)
    tl.store(q_ptr + row * K + cols, tl.div_rn(x, scale).to(q_ptr.dtype.element_ty), mask=cols < K)
    tl.store(scale_ptr + row, scale)


@triton.jit
def quantize_kernel(
    x_ptr,  # [T, K], rows x_stride apart
    q_ptr,  # float8_e4m3fn [T, K], contiguous
    scale_ptr,  # float32 [T]
    x_stride,
    K: tl.constexpr,
    TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, TILE)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row * x_stride + cols, mask=cols < K, other=0.0).to(tl.float32)
    store_scaled(x, q_ptr, scale_ptr, row, cols, K)
