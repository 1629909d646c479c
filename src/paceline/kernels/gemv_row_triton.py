# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""y = w x for one row of x over dense, int8 and fp8 weights: the Triton side of kernels/gemv.py for a single stream.

A program has BLOCK_N whole rows of the weight in registers. They are asked for at once, before the kernel that makes x
has ended; nothing goes through shared memory, and threads meet only in the sums at the end. Every thread has 8
neighbouring columns of a step, as much of x as one load brings: with 16 of int8, x would change threads at every step.
The RMS norm's factor is applied to the result: x * g goes in, and each program squares the x it loads anyway.

Of a mixture of experts it is one row's products with the weights of its experts, one after the other in memory.

Shapes: N rows of the weight, K columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.kernels.gemv_triton import block_rows, finish


@triton.jit
def as_float32(w, FORMAT: tl.constexpr, ASM: tl.constexpr):
    """int8 by way of float16's 1,024 + 128 + q, whose last byte is q + 128: few units convert integers. On an H100
    Llama-3.1-8B's linears take 2.44 ms a pass so, and 2.49 by conversions."""
    if FORMAT == "int8" and ASM:
        w = tl.inline_asm_elementwise(
            """{ .reg .b32 u, a, b, m; .reg .b16 p, q, r, s; xor.b32 u, $4, 0x80808080; mov.b32 m, 0xE480E480;
            prmt.b32 a, u, 0x64646464, 0x4140; prmt.b32 b, u, 0x64646464, 0x4342;
            add.f16x2 a, a, m; add.f16x2 b, b, m; mov.b32 {p, q}, a; mov.b32 {r, s}, b;
            cvt.f32.f16 $0, p; cvt.f32.f16 $1, q; cvt.f32.f16 $2, r; cvt.f32.f16 $3, s; }""",
            "=f,=f,=f,=f,r",
            [w],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    return w.to(tl.float32)


@triton.jit
def gemv_row_kernel(
    x_ptr,  # [K]
    w_ptr,  # [N, K], values
    scale_ptr,  # [N]; None for dense
    norm_ptr,  # [K]; None: no norm
    bias_ptr,  # [N]; None: no bias
    residual_ptr,  # [outputs]; None: no residual
    y_ptr,  # [outputs]
    expert_ptr,  # None: there is one weight; else whose it takes: [pairs], for as many rows of y
    N,
    eps,
    SHARE: tl.constexpr,  # rows of y that have one row of x, with experts
    K: tl.constexpr,  # a model has a handful of them, and whole steps need no masks
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # columns a step
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    block = tl.program_id(0)
    rows, _ = block_rows(block, N, GATED, BLOCK_N)
    w_rows = w_ptr + rows.to(tl.int64)[:, None] * K
    cols = tl.max_contiguous(tl.arange(0, BLOCK_K), 8)[None, :]
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    if PDL:
        gdc_launch_dependents()
    if expert_ptr is not None:
        if PDL:
            gdc_wait()
        pair = tl.program_id(1)
        expert = tl.load(expert_ptr + pair)
        w_rows += expert.to(tl.int64) * N * K
        x_ptr += pair // SHARE * K
        y_ptr += pair * (N // 2 if GATED else N)
        if scale_ptr is not None:
            scale_ptr += expert * N
    w = ()
    for step in tl.static_range(STEPS):
        at = step * BLOCK_K + cols
        w += (load(w_rows + at, at, K, BLOCK_K, "evict_first"),)
    if PDL and expert_ptr is None:
        gdc_wait()
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([1, BLOCK_K], tl.float32)
    for step in tl.static_range(STEPS):
        at = step * BLOCK_K + cols
        x = load(x_ptr + at, at, K, BLOCK_K, "evict_last").to(tl.float32)
        if norm_ptr is not None:
            squares += x * x
            x *= load(norm_ptr + at, at, K, BLOCK_K, "evict_last").to(tl.float32)
        sums += as_float32(w[step], FORMAT, ASM) * x
    acc = tl.sum(sums, 1)[:, None]
    if norm_ptr is not None:
        acc *= tl.rsqrt(tl.sum(squares, 1) / K + eps)[None, :]
    finish(
        acc, block, scale_ptr, bias_ptr, residual_ptr, y_ptr,
        N, FORMAT, ACTIVATION, GATED, 1, BLOCK_N,
    )  # fmt: skip


@triton.jit
def load(pointers, at, K: tl.constexpr, BLOCK_K: tl.constexpr, POLICY: tl.constexpr):
    """What lies there, 0 from K on, which an odd last step reaches."""
    if K % BLOCK_K == 0:
        values = tl.load(pointers, eviction_policy=POLICY)
    else:
        values = tl.load(pointers, mask=at < K, other=0.0, eviction_policy=POLICY)
    return values
