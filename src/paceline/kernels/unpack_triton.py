# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""A packed weight written out: the Triton side of kernels/unpack.py.

Shapes: N rows of the weight, K columns. A program has BLOCK_N rows and, of int8 and fp8, BLOCK_K columns, of int4 a
tile of 4 groups.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.kernels.gemm_triton import byte_floats, int4_values


@triton.jit
def unpack_kernel(
    w_ptr,  # int32 [N, w_stride], words
    scale_ptr,  # float32 [N]; int4: int32 [N, groups of whole tiles]
    out_ptr,  # [N, K]
    N,
    w_stride,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ASM: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = (rows < N)[:, None]
    rows = tl.where(rows < N, rows, 0).to(tl.int64)
    tile = tl.program_id(1)
    if FORMAT == "int4":
        words = tl.load(w_ptr + rows[:, None] * w_stride + tile * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :])
        for plane in tl.static_range(4):
            group = tile * 4 + plane
            scales = tl.load(scale_ptr + rows[:, None] * (w_stride * 8 // GROUP) + group)
            cols = (group * GROUP + tl.arange(0, GROUP))[None, :]
            values = int4_values(words, scales, plane, DTYPE, ASM)
            tl.store(out_ptr + rows[:, None] * K + cols, values, mask=live & (cols < K))
    else:
        at = (tile * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4))[None, :]
        words = tl.load(w_ptr + rows[:, None] * w_stride + at, mask=at < w_stride, other=0)
        a, b, c, d = byte_floats(words, FORMAT, DTYPE, ASM)
        values = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK_N, BLOCK_K]).to(tl.float32)
        values *= tl.load(scale_ptr + rows)[:, None]
        cols = (tile * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        tl.store(out_ptr + rows[:, None] * K + cols, values.to(DTYPE), mask=live & (cols < K))
