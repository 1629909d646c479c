# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""y = w x over int4 weights for one row of x: the Triton side of kernels/gemv.py for this format.

What lets half a byte a value keep up with the memory:
- One LOP3 makes two numbers OFFSET + q of two nibbles, and the matrix unit multiplies them: the fewest instructions
  there are. (OFFSET + 8) * sum(x) is taken off a group's product; that sum is ones times x.
- The matrix unit wants certain columns of a row in certain threads. The words lie so (formats/int4.py) that the 16
  bytes a thread loads are those: from memory to the product no value changes its thread.
- Each warp has tiles of 4 groups of columns of its own, so that no warp waits for another's weights: a batched product
  of 4 * WARPS batches (group of the tile, warp), added at the end.

Shapes: N rows of the weight, K columns; M columns of the product, the fewest that the unit takes, all the same.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.kernels.gemv_triton import block_rows, finish, weight_rows
from paceline.kernels.prefetch_triton import LINE_BYTES, prefetch_l2

M = tl.constexpr(8)
# On two halves of a word at once; the bits under the nibbles are OFFSET, twice.
NIBBLES = "{ .reg .b32 t; and.b32 t, $2, 15; shr.u32 t, $1, t; lop3.b32 $0, t, 0x000F000F, %s, 0xEA; }"
BF16_NIBBLES = tl.constexpr(NIBBLES % "0x43004300")
FP16_NIBBLES = tl.constexpr(NIBBLES % "0x64006400")


@triton.jit
def nibble_floats(halves, shift, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """OFFSET + q of the nibble at bit `shift` of each half of a word. OFFSET is the power of two whose last mantissa
    bit is 1: 128 (0x4300) in bfloat16, 1024 (0x6400) in float16."""
    if ASM:
        TEXT: tl.constexpr = BF16_NIBBLES if tl.bfloat16 == DTYPE else FP16_NIBBLES
        bits = tl.inline_asm_elementwise(TEXT, "=r,r,r", [halves, shift], dtype=tl.int16, is_pure=True, pack=2)
    else:
        ONE: tl.constexpr = 0x4300 if tl.bfloat16 == DTYPE else 0x6400
        bits = (((halves >> shift) & 15) | ONE).to(tl.int16)
    return bits.to(DTYPE, bitcast=True)


@triton.jit(do_not_specialize=["T"])
def gemv_int4_kernel(
    x_ptr,  # [K]
    w_ptr,  # int16 [N, w_stride], half words
    scale_ptr,  # int32 [N, groups of whole tiles]: a group's scale (low half) and offset, bfloat16
    bias_ptr,  # [N]; None: no bias
    residual_ptr,  # [outputs]; None: no residual
    y_ptr,  # [outputs]
    N,
    w_stride,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,  # steps of the weight asked for before the previous kernel's results are awaited
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    OFFSET: tl.constexpr = 128 if tl.bfloat16 == DTYPE else 1024
    SPAN: tl.constexpr = WARPS * 4 * GROUP  # columns a step
    STEPS: tl.constexpr = (K + SPAN - 1) // SPAN
    EVEN: tl.constexpr = K % SPAN == 0
    EIGHTS: tl.constexpr = BLOCK_N // 8  # the unit takes 8 rows from 32 threads, 4 threads a row
    BATCHES: tl.constexpr = 4 * WARPS
    block = tl.program_id(0)
    rows, _ = block_rows(block, N, GATED, BLOCK_N)
    if PDL:
        gdc_launch_dependents()
        if PREFETCH > 0:
            line = tl.arange(0, (2 * PREFETCH * WARPS * GROUP + LINE_BYTES - 1) // LINE_BYTES) * (LINE_BYTES // 2)
            prefetch_l2(w_ptr + rows.to(tl.int64)[:, None] * w_stride + tl.minimum(line, w_stride - 1)[None, :])
        gdc_wait()

    warp = tl.arange(0, WARPS)[:, None, None]
    # What 32 threads load at once, 8 half words each, and what each of them loads after that, of 8 rows at a time.
    half = tl.arange(0, 256)[None, None, :]
    more = tl.arange(0, GROUP // 32 * EIGHTS)[None, :, None]
    w_rows = weight_rows(block * BLOCK_N + more % EIGHTS * 8 + half // 32, N, GATED).to(tl.int64)
    w_at = w_ptr + w_rows * w_stride + warp * GROUP + more // EIGHTS * 32 + half % 32
    scale_rows = rows.to(tl.int64)[None, :, None] * (w_stride // GROUP * 4)
    scale_at = scale_ptr + scale_rows + warp * 4 + tl.arange(0, 4)[None, None, :]
    batch = tl.arange(0, BATCHES)[:, None, None]
    x_cols = (batch % WARPS * 4 + batch // WARPS) * GROUP + tl.arange(0, GROUP)[None, :, None]

    shift = (4 * tl.arange(0, 4)).to(tl.int16)[:, None, None, None]
    ones = tl.full([BATCHES, 16, GROUP], 1, DTYPE)
    acc = tl.zeros([BATCHES, BLOCK_N // 16, 16, M], tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        real = (step * SPAN + warp * (4 * GROUP) < K) | EVEN  # past K there are neither words nor scales
        w = tl.load(w_at + step * (WARPS * GROUP), mask=real, other=0, eviction_policy="evict_first")
        bits = tl.load(scale_at + step * BATCHES, mask=real, other=0, eviction_policy="evict_first")
        cols = step * SPAN + x_cols
        x = tl.load(x_ptr + cols, mask=(cols < K) | EVEN, other=0.0, eviction_policy="evict_last")
        x = tl.broadcast_to(x, [BATCHES, GROUP, M])
        # [warp, 32 columns of 4 groups, 8 rows, row, thread of the row, pair of columns, 2]: pairs lie threads apart
        w = tl.permute(tl.reshape(w, [WARPS, GROUP // 32, EIGHTS, 8, 4, 4, 2]), [0, 2, 3, 1, 5, 4, 6])
        w = nibble_floats(tl.reshape(w, [1, WARPS, BLOCK_N, GROUP]), shift, DTYPE, ASM)
        product = tl.dot(tl.reshape(w, [BATCHES, BLOCK_N, GROUP]), x)
        total = tl.dot(ones, x)[:, None]  # of 16 rows, all the same
        bits = tl.reshape(tl.permute(bits, [2, 0, 1]), [BATCHES, BLOCK_N // 16, 16, 1])
        scale = (bits << 16).to(tl.float32, bitcast=True)
        offset = (bits & -65536).to(tl.float32, bitcast=True) - (OFFSET + 8) * scale
        acc += tl.reshape(product, acc.shape) * scale + total * offset

    acc = tl.sum(tl.reshape(acc, [BATCHES, BLOCK_N, M]), 0)
    finish(
        acc, block, scale_ptr, bias_ptr, residual_ptr, y_ptr,
        N, "int4", ACTIVATION, GATED, M, BLOCK_N,
    )  # fmt: skip
