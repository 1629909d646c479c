# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""y = w x for up to 8 rows of x in float32: the Triton side of kernels/gemv_float32.py, which has the legend."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.kernels.gemv_triton import block_rows, finish_rows, load_w
from paceline.kernels.prefetch_triton import LINE_BYTES, prefetch_l2


@triton.jit(do_not_specialize=["T"])
def gemv_float32_kernel(
    x_ptr,  # [T, K], rows x_stride apart
    w_ptr,  # [N, K], contiguous
    bias_ptr,  # [N]; None: no bias
    residual_ptr,  # [T, outputs]; None: no residual
    y_ptr,  # [T, outputs]
    T,
    N,
    x_stride,
    y_stride,
    residual_stride,
    K: tl.constexpr,  # a model has a handful of them, and a loop of known length needs no masks
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # columns a step
    AHEAD: tl.constexpr,  # lines of a row of the weight that are asked for before x is awaited
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    block = tl.program_id(0)
    rows, _ = block_rows(block, N, GATED, BLOCK_N)
    if DEPENDENT:
        gdc_launch_dependents()
        ahead = tl.minimum(tl.arange(0, AHEAD) * (LINE_BYTES // 4), K - 1)
        prefetch_l2(w_ptr + rows.to(tl.int64)[:, None] * K + ahead[None, :])
        gdc_wait()
    EVEN: tl.constexpr = K % BLOCK_K == 0
    toks = tl.arange(0, M)
    live = toks < T
    w_rows = w_ptr + rows.to(tl.int64)[:, None, None] * K
    x_rows = x_ptr + toks.to(tl.int64)[None, :, None] * x_stride
    sums = tl.zeros([BLOCK_N, M, BLOCK_K], tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        at = (first + tl.arange(0, BLOCK_K))[None, None, :]
        w = load_w(w_rows + at, at, K, EVEN)
        sums += w * tl.load(x_rows + at, mask=live[None, :, None] & ((at < K) | EVEN), other=0.0)
    finish_rows(
        tl.sum(sums, 2), block, bias_ptr, residual_ptr, y_ptr, toks[None, :], live[None, :],
        N, y_stride, residual_stride, ACTIVATION, GATED, M, BLOCK_N,
    )  # fmt: skip
