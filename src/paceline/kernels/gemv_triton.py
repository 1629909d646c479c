# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""The Triton side of kernels/gemv.py for several rows of x over dense, int8 and fp8 weights: one kernel that streams a
weight once, and what all of the kernels have in common. (One row and int4 have kernels of their own,
kernels/gemv_row_triton.py and kernels/gemv_int4_triton.py.)

Shapes: T rows of x (1 to 16), N outputs, K inputs; M columns of the product: the T rows padded to 8 or 16 as the matrix
unit takes them, the weight as its left operand. A program owns BLOCK_N rows of the weight and one of SPLIT parts of K.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.kernels.prefetch_triton import LINE_BYTES, prefetch_l2


@triton.jit
def as_float(bits, DTYPE: tl.constexpr):
    return bits.to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def int8_pair(words, PAIR: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Bytes PAIR and PAIR + 2 of each word, two's complement, as two floats: (ONE | low 7 bits) - (ONE | sign bit).
    The sign bit, 128, is the last of bfloat16's exponent and makes 256 of ONE's 128; in float16 1,152 of 1,024."""
    words = words >> (8 * PAIR)
    if ASM:
        low, high = tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, m; mov.b32 m, 0xBF80BF80;  // -1, twice
            lop3.b32 a, $2, 0x007F007F, 0x43004300, 0xEA; lop3.b32 b, $2, 0x00800080, 0x43004300, 0xEA;
            fma.rn.bf16x2 a, b, m, a; mov.b32 {$0, $1}, a; }""",
            "=h,=h,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
    else:
        ONE: tl.constexpr = 0x4300 if tl.bfloat16 == DTYPE else 0x6400
        low = as_float((words & 127) | ONE, DTYPE) - as_float((words & 128) | ONE, DTYPE)
        high = as_float(((words >> 16) & 127) | ONE, DTYPE) - as_float(((words >> 16) & 128) | ONE, DTYPE)
    return low, high


@triton.jit
def fp8_pair(words, PAIR: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Bytes PAIR and PAIR + 2 of each word, e4m3, as two floats: sign, exponent and mantissa moved to where DTYPE has
    them, then times 2 to the difference of the exponents' biases, 127 - 7 or 15 - 7. Exact, subnormals too."""
    if PAIR == 0:
        words = words << 8
    if ASM:  # the CPU's way of the other branch, on both halves at once
        low, high = tl.inline_asm_elementwise(
            """{ .reg .b32 a, m, z; shr.u32 a, $2, 4; and.b32 a, a, 0x07F007F0; mov.b32 m, 0x7B807B80; mov.b32 z, 0;
            lop3.b32 a, $2, 0x80008000, a, 0xEA; fma.rn.bf16x2 a, a, m, z; mov.b32 {$0, $1}, a; }""",
            "=h,=h,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
    else:
        SHIFT: tl.constexpr = 4 if tl.bfloat16 == DTYPE else 1
        FACTOR: tl.constexpr = 2.0**120 if tl.bfloat16 == DTYPE else 256.0
        MASK: tl.constexpr = 0x7F00 >> SHIFT
        low = as_float(((words >> SHIFT) & MASK) | (words & 0x8000), DTYPE).to(tl.float32) * FACTOR
        words = words >> 16
        high = as_float(((words >> SHIFT) & MASK) | (words & 0x8000), DTYPE).to(tl.float32) * FACTOR
        low, high = low.to(DTYPE), high.to(DTYPE)
    return low, high


@triton.jit
def load_w(pointers, at, width, EVEN: tl.constexpr):
    """The weight behind `pointers`, at places `at` of a row; 0 from `width` on, which an odd last step reaches."""
    if EVEN:
        w = tl.load(pointers, eviction_policy="evict_first")
    else:
        w = tl.load(pointers, mask=at < width, other=0.0, eviction_policy="evict_first")
    return w


@triton.jit
def load_x(x_ptr, x_stride, cols, toks, T, K, EVEN: tl.constexpr):
    """x of [..., columns, 1] places and [toks]; 0 where there is none."""
    inside = ((cols < K) | EVEN) & (toks < T)
    return tl.load(x_ptr + cols + toks * x_stride, mask=inside, other=0.0, eviction_policy="evict_last")


@triton.jit
def weight_rows(index, N, GATED: tl.constexpr):
    """The weight's rows for rows `index` of the product; row 0 where there is none. Gate row i and up row i + N / 2 lie
    side by side, so that one program has both."""
    rows = index // 2 + (index % 2) * (N // 2) if GATED else index
    return tl.where(index < N, rows, 0)


@triton.jit
def block_rows(block, N, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The weight's rows of a block, and which of them exist."""
    index = block * BLOCK_N + tl.arange(0, BLOCK_N)
    return weight_rows(index, N, GATED), index < N


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh(z)) = sigmoid(2 z)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return x


@triton.jit
def matrix_product(
    x_ptr, x_stride, w_rows, part,
    T, K: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """w x^T, [rows, M], for values in x's dtype."""
    acc = tl.zeros([w_rows.shape[0], M], tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        cols = (part * STEPS + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        w = load_w(w_rows + cols[None, :], cols[None, :], K, EVEN)
        x = load_x(x_ptr, x_stride, cols[:, None], tl.arange(0, M)[None, :], T, K, EVEN)
        acc = tl.dot(w, x, acc)
    return acc


@triton.jit
def byte_product(
    x_ptr, x_stride, w_rows, width, part,
    T, K: tl.constexpr, FORMAT: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """w x^T, [rows, M], for words of 4 bytes, unscaled."""
    HALF: tl.constexpr = BLOCK_K // 2
    half = tl.arange(0, HALF)
    acc = tl.zeros([w_rows.shape[0], M], tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        tile = part * STEPS + step
        at = (tile * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4))[None, :]
        words = load_w(w_rows + at, at, width, EVEN)
        for pair in tl.static_range(2):
            if FORMAT == "int8":
                low, high = int8_pair(words, pair, x_ptr.dtype.element_ty, ASM)
            else:
                low, high = fp8_pair(words, pair, x_ptr.dtype.element_ty, ASM)
            w = tl.reshape(tl.join(low, high), [w_rows.shape[0], HALF])
            cols = tile * BLOCK_K + 4 * (half // 2) + pair + 2 * (half % 2)
            x = load_x(x_ptr, x_stride, cols[:, None], tl.arange(0, M)[None, :], T, K, EVEN)
            acc = tl.dot(w, x, acc)
    return acc


@triton.jit
def finish(
    acc, block, scale_ptr, bias_ptr, residual_ptr, y_ptr,
    T, N, y_stride, residual_stride,
    FORMAT: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All that follows the sums over K, [BLOCK_N, M], of one block of rows; stores y."""
    index = block * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, live = block_rows(block, N, GATED, BLOCK_N)
    toks = tl.arange(0, M)[None, :]
    if FORMAT == "int8" or FORMAT == "fp8":
        acc *= tl.load(scale_ptr + rows).to(tl.float32)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_N // 2, 2, M]), [0, 2, 1]))
        acc = activate(gate, ACTIVATION) * up
        index = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        live = index < N // 2
    else:
        acc = activate(acc, ACTIVATION)
    live_out = live[:, None] & (toks < T)
    if residual_ptr is not None:
        at = residual_ptr + toks * residual_stride + index[:, None]
        acc += tl.load(at, mask=live_out, other=0.0).to(tl.float32)
    tl.store(y_ptr + toks * y_stride + index[:, None], acc.to(y_ptr.dtype.element_ty), mask=live_out)


@triton.jit
def add_parts_kernel(
    parts_ptr,  # float32 [SPLIT, N, M], as gemv_kernel leaves it
    scale_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    T,
    N,
    y_stride,
    residual_stride,
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Adds the parts of a split product in their order, the same sum every time, and goes on where gemv_kernel would
    without a split."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    block = tl.program_id(0)
    index = block * BLOCK_N + tl.arange(0, BLOCK_N)
    toks = tl.arange(0, M)
    acc = tl.zeros([BLOCK_N, M], tl.float32)
    for part in tl.static_range(SPLIT):
        here = parts_ptr + part * N * M + toks
        acc += tl.load(here[None, :] + index[:, None] * M, mask=(index < N)[:, None], other=0.0)
    finish(
        acc, block, scale_ptr, bias_ptr, residual_ptr, y_ptr,
        T, N, y_stride, residual_stride, FORMAT, ACTIVATION, GATED, M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def gemv_kernel(
    x_ptr,  # [T, K], rows x_stride apart
    w_ptr,  # [N, w_stride]: values, or in int8 and fp8 int32 words of 4
    scale_ptr,  # [N]; None for dense
    bias_ptr,  # [N]; None: no bias
    residual_ptr,  # [T, outputs]; None: no residual
    y_ptr,  # [T, outputs]
    parts_ptr,  # SPLIT > 1: float32 [SPLIT, N, M], the sums of each part; y is not written
    T,
    N,
    x_stride,
    w_stride,
    y_stride,
    residual_stride,
    K: tl.constexpr,  # a model has a handful of them, and a loop of known length needs no masks
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # columns a step
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,  # steps of the weight asked for before the previous kernel's results are awaited
    PDL: tl.constexpr,
    ASM: tl.constexpr,
):
    block = tl.program_id(0)
    part = tl.program_id(1)
    rows, live = block_rows(block, N, GATED, BLOCK_N)
    w_rows = w_ptr + rows.to(tl.int64)[:, None] * w_stride
    SPAN: tl.constexpr = BLOCK_K * SPLIT
    STEPS: tl.constexpr = (K + SPAN - 1) // SPAN
    EVEN: tl.constexpr = K % SPAN == 0
    WORDS: tl.constexpr = BLOCK_K if FORMAT == "dense" else BLOCK_K // 4

    if PDL:
        gdc_launch_dependents()
        if PREFETCH > 0:
            LINE: tl.constexpr = LINE_BYTES // (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
            LINES: tl.constexpr = (PREFETCH * WORDS + LINE - 1) // LINE
            ahead = part * STEPS * WORDS + tl.arange(0, LINES) * LINE
            prefetch_l2(w_rows + tl.minimum(ahead, w_stride - 1)[None, :])
        gdc_wait()

    if FORMAT == "dense":
        acc = matrix_product(x_ptr, x_stride, w_rows, part, T, K, M, BLOCK_K, STEPS, STAGES, EVEN)
    else:
        acc = byte_product(x_ptr, x_stride, w_rows, w_stride, part, T, K, FORMAT, M, BLOCK_K, STEPS, STAGES, EVEN, ASM)

    if SPLIT > 1:
        here = parts_ptr + part * N * M + tl.arange(0, M)
        index = block * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(here[None, :] + index[:, None] * M, acc, mask=live[:, None])
    else:
        finish(
            acc, block, scale_ptr, bias_ptr, residual_ptr, y_ptr,
            T, N, y_stride, residual_stride, FORMAT, ACTIVATION, GATED, M, BLOCK_N,
        )  # fmt: skip
