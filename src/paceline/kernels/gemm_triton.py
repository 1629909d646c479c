# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""y = w x for several rows of x over dense, int8, fp8 and int4 weights: one kernel, which streams a weight once for up
to 128 rows, and has neighbouring programs for each 128 of more. The Triton side of kernels/gemv.py and, with a weight
for each block of rows, of kernels/experts.py.

The weight is the product's left operand: it has the many rows that the matrix unit wants (64 a warp group on Hopper,
16 a warp elsewhere), and from memory it goes through registers only, where it is unpacked to the very numbers that a
format's `unpack` gives. x comes from the L2 cache, once for each block of the weight's rows: BLOCK_N is at least M, or
the cache is what bounds it.

Shapes: T rows of x, N outputs, K inputs; M columns of the product: up to as many rows of x, padded to 16, 32, 64 or
128. A program owns BLOCK_N rows of the weight, one of SPLIT parts of K and one group of M.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.kernels.gemv_triton import activate, block_rows, finish_rows, load_w
from paceline.kernels.prefetch_triton import LINE_BYTES, prefetch_l2

# Two bytes of a word moved into two halves, then as the CPU's branch has it, on both halves at once.
INT8_ASM = tl.constexpr("""{ .reg .b32 a, b, m, t; mov.b32 m, 0xBF80BF80;  // -1, twice
    prmt.b32 t, $4, 0, 0x4140; lop3.b32 a, t, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 b, t, 0x00800080, 0x43004300, 0xEA; fma.rn.bf16x2 a, b, m, a; mov.b32 {$0, $1}, a;
    prmt.b32 t, $4, 0, 0x4342; lop3.b32 a, t, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 b, t, 0x00800080, 0x43004300, 0xEA; fma.rn.bf16x2 a, b, m, a; mov.b32 {$2, $3}, a; }""")
FP8_ASM = tl.constexpr("""{ .reg .b32 a, m, t, z; mov.b32 m, 0x7B807B80; mov.b32 z, 0;
    prmt.b32 t, $4, 0, 0x1404; shr.u32 a, t, 4; and.b32 a, a, 0x07F007F0;
    lop3.b32 a, t, 0x80008000, a, 0xEA; fma.rn.bf16x2 a, a, m, z; mov.b32 {$0, $1}, a;
    prmt.b32 t, $4, 0, 0x3424; shr.u32 a, t, 4; and.b32 a, a, 0x07F007F0;
    lop3.b32 a, t, 0x80008000, a, 0xEA; fma.rn.bf16x2 a, a, m, z; mov.b32 {$2, $3}, a; }""")
# 128 + q of two nibbles, less 136, times the scale, plus the offset: rounded once, the last time.
INT4_ASM = """{ .reg .b32 t, o, m, s; shr.u32 t, $2, %d; lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;
    mov.b32 o, 0x3F803F80; mov.b32 m, 0xC308C308; fma.rn.bf16x2 t, t, o, m;
    prmt.b32 s, $3, 0, 0x1010; prmt.b32 o, $3, 0, 0x3232; fma.rn.bf16x2 t, t, s, o; mov.b32 {$0, $1}, t; }"""
INT4_PLANES = tl.constexpr(tuple(INT4_ASM % (4 * plane) for plane in range(4)))


@triton.jit
def byte_floats(words, FORMAT: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The four values of each word. Few units convert integers: int8, for bfloat16, is (ONE | low 7 bits) - (ONE | sign
    bit), where the sign bit, 128, is the last of the exponent and makes 256 of ONE's 128."""
    if ASM:
        TEXT: tl.constexpr = INT8_ASM if FORMAT == "int8" else FP8_ASM
        a, b, c, d = tl.inline_asm_elementwise(
            TEXT,
            "=h,=h,=h,=h,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
    else:
        a, b = byte_float(words << 24, FORMAT, DTYPE), byte_float(words << 16, FORMAT, DTYPE)
        c, d = byte_float(words << 8, FORMAT, DTYPE), byte_float(words, FORMAT, DTYPE)
    return a, b, c, d


@triton.jit
def byte_float(words, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """The value of each word's last byte. fp8 (e4m3): sign, exponent and mantissa moved to where DTYPE has them, then
    times 2 to the difference of the exponents' biases, 127 - 7 or 15 - 7. Exact, subnormals too."""
    words = words >> 24  # the sign fills the word
    if FORMAT == "int8":
        w = words.to(DTYPE)
    else:
        SHIFT: tl.constexpr = 4 if tl.bfloat16 == DTYPE else 7
        FACTOR: tl.constexpr = 2.0**120 if tl.bfloat16 == DTYPE else 256.0
        bits = (((words & 0x7F) << SHIFT) | (words & -0x8000)).to(tl.int16)
        w = (bits.to(DTYPE, bitcast=True).to(tl.float32) * FACTOR).to(DTYPE)
    return w


@triton.jit
def int4_pair(words, scales, PLANE: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """(q - 8) * scale + offset for nibbles PLANE and PLANE + 4 of each word. `scales`: the offset over the scale."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            INT4_PLANES[PLANE],
            "=h,=h,r,r",
            [words, scales],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
    else:
        scale = (scales << 16).to(tl.float32, bitcast=True)
        offset = (scales & -65536).to(tl.float32, bitcast=True)
        low = (((words >> (4 * PLANE) & 15) - 8).to(tl.float32) * scale + offset).to(DTYPE)
        high = (((words >> (4 * PLANE + 16) & 15) - 8).to(tl.float32) * scale + offset).to(DTYPE)
    return low, high


@triton.jit
def int4_values(words, scales, PLANE: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The same in the order of the columns, [rows, 2 * words]."""
    rows: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    low, high = int4_pair(words, scales, PLANE, DTYPE, ASM)
    # [32 columns, thread of the matrix unit's four, pair of its columns, 2]: pairs lie threads apart
    w = tl.reshape(tl.join(low, high), [rows, WORDS // 16, 4, 4, 2])
    return tl.reshape(tl.permute(w, [0, 1, 3, 2, 4]), [rows, 2 * WORDS])


@triton.jit
def load_x(x_rows, live, cols, K, EVEN: tl.constexpr):
    """x of [columns, 1] places and the rows behind [1, M] pointers; 0 where there is none."""
    return tl.load(x_rows + cols, mask=((cols < K) | EVEN) & live, other=0.0, eviction_policy="evict_last")


@triton.jit
def dense_product(
    x_rows, live, w_rows, first, steps,
    K: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """w x^T, [rows, M], for values in x's dtype."""
    acc = tl.zeros([w_rows.shape[0], M], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        cols = (first + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        w = load_w(w_rows + cols[None, :], cols[None, :], K, EVEN)
        acc = tl.dot(w, load_x(x_rows, live, cols[:, None], K, EVEN), acc)
    return acc


@triton.jit
def byte_product(
    x_rows, live, w_rows, first, steps,
    K: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """w x^T, [rows, M], for words of 4 bytes, unscaled. Of every 16 columns a thread of the matrix unit has 2t, 2t + 1,
    2t + 8 and 2t + 9: a word gives it these four, and x comes in the order that this makes of the columns."""
    WORDS: tl.constexpr = BLOCK_K // 4
    rows: tl.constexpr = w_rows.shape[0]
    k = tl.arange(0, BLOCK_K)
    order = k // 16 * 16 + k % 8 // 2 * 4 + k % 16 // 8 * 2 + k % 2
    order = tl.max_contiguous(tl.multiple_of(order, 2), 2)
    acc = tl.zeros([rows, M], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        at = ((first + step) * WORDS + tl.arange(0, WORDS))[None, :]
        words = load_w(w_rows + at, at, K // 4, EVEN)
        a, b, c, d = byte_floats(words, FORMAT, DTYPE, ASM)
        w = tl.join(tl.join(a, c), tl.join(b, d))  # [rows, words, 8 columns apart, neighbours]
        w = tl.permute(tl.reshape(w, [rows, WORDS // 4, 4, 2, 2]), [0, 1, 3, 2, 4])
        cols = (first + step) * BLOCK_K + order
        acc = tl.dot(tl.reshape(w, [rows, BLOCK_K]), load_x(x_rows, live, cols[:, None], K, EVEN), acc)
    return acc


@triton.jit
def int4_product(
    x_rows, live, w_rows, scale_rows, first, steps,
    K: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """w x^T, [rows, M], for words of pairs of columns of 4 groups; BLOCK_K / 4 neighbouring columns of each a step."""
    WORDS: tl.constexpr = BLOCK_K // 8
    COLUMNS: tl.constexpr = BLOCK_K // 4
    TILE_STEPS: tl.constexpr = 4 * GROUP // BLOCK_K
    WIDTH: tl.constexpr = (K + 4 * GROUP - 1) // (4 * GROUP) * (GROUP // 2)
    rows: tl.constexpr = w_rows.shape[0]
    acc = tl.zeros([rows, M], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        place = first + step
        at = (place * WORDS + tl.arange(0, WORDS))[None, :]
        words = load_w(w_rows + at, at, WIDTH, EVEN)
        tile = place // TILE_STEPS
        for plane in tl.static_range(4):
            group = tile * 4 + plane
            scales = load_w(scale_rows + group, group + tl.zeros([1, 1], tl.int32), WIDTH * 8 // GROUP, EVEN)
            w = int4_values(words, scales, plane, DTYPE, ASM)
            cols = group * GROUP + place % TILE_STEPS * COLUMNS + tl.arange(0, COLUMNS)
            acc = tl.dot(w, load_x(x_rows, live, cols[:, None], K, EVEN), acc)
    return acc


@triton.jit(do_not_specialize=["T"])
def gemm_kernel(
    x_ptr,  # [rows, K], rows x_stride apart
    w_ptr,  # [N, w_stride]: values, or int32 words of 4 bytes or 8 nibbles; of experts [E, N, w_stride]
    scale_ptr,  # [N]; int4: int32 [N, groups of whole tiles]; None for dense
    bias_ptr,  # [N]; None: no bias
    residual_ptr,  # [T, outputs]; None: no residual
    y_ptr,  # [T, outputs]
    parts_ptr,  # SPLIT > 1: float32 [SPLIT, T, N], the sums of each part; y is not written
    expert_ptr,  # [groups]: whose weight a group of rows takes, negative for none; None: there is one weight
    row_ptr,  # [groups, M]: the rows of y of each group, negative for none; with experts only
    T,
    N,
    x_stride,
    w_stride,
    y_stride,
    residual_stride,
    SHARE: tl.constexpr,  # rows of y that have one row of x, with experts
    K: tl.constexpr,  # a model has a handful of them, and a loop of known length needs no masks
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,  # int4's
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
    group = tl.program_id(0)  # neighbours share a weight
    block = tl.program_id(1)
    part = tl.program_id(2)
    EXPERTS: tl.constexpr = expert_ptr is not None
    WHOLE: tl.constexpr = 4 * GROUP if FORMAT == "int4" else BLOCK_K  # columns that only come together
    TOTAL: tl.constexpr = (K + WHOLE - 1) // WHOLE * (WHOLE // BLOCK_K)
    STEPS: tl.constexpr = (TOTAL + SPLIT - 1) // SPLIT
    EVEN: tl.constexpr = K % WHOLE == 0
    PLACES: tl.constexpr = BLOCK_K // 8 if FORMAT == "int4" else BLOCK_K if FORMAT == "dense" else BLOCK_K // 4
    outputs, live = block_rows(block, N, GATED, BLOCK_N)
    rows = outputs
    toks = group * M + tl.arange(0, M)
    if PDL:
        gdc_launch_dependents()
        if PREFETCH > 0 and not EXPERTS:
            LINE: tl.constexpr = LINE_BYTES // (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
            LINES: tl.constexpr = (PREFETCH * PLACES + LINE - 1) // LINE
            ahead = part * STEPS * PLACES + tl.arange(0, LINES) * LINE
            at = rows.to(tl.int64)[:, None] * w_stride + tl.minimum(ahead, w_stride - 1)[None, :]
            prefetch_l2(w_ptr + at)
        gdc_wait()
    x_toks = toks
    if EXPERTS:
        expert = tl.load(expert_ptr + group)
        if expert < 0:
            return
        rows += expert * N  # below 2^31: 16,384 experts of 131,072 rows
        toks = tl.load(row_ptr + toks)
        x_toks = toks // SHARE
    in_x = (toks >= 0) & (toks < T)
    x_rows = x_ptr + tl.where(in_x, x_toks, 0).to(tl.int64)[None, :] * x_stride
    w_rows = w_ptr + rows.to(tl.int64)[:, None] * w_stride
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    first = part * STEPS
    steps = STEPS
    if TOTAL % SPLIT != 0:
        steps = tl.minimum(STEPS, TOTAL - first)
    if FORMAT == "int4":
        scale_rows = scale_ptr + rows.to(tl.int64)[:, None] * (w_stride * 8 // GROUP)
        acc = int4_product(
            x_rows, in_x[None, :], w_rows, scale_rows, first, steps,
            K, GROUP, DTYPE, M, BLOCK_K, STAGES, EVEN, ASM,
        )  # fmt: skip
    elif FORMAT == "dense":
        acc = dense_product(x_rows, in_x[None, :], w_rows, first, steps, K, M, BLOCK_K, STAGES, EVEN)
    else:
        acc = byte_product(
            x_rows, in_x[None, :], w_rows, first, steps,
            K, FORMAT, DTYPE, M, BLOCK_K, STAGES, EVEN, ASM,
        )  # fmt: skip
        acc *= tl.load(scale_ptr + rows)[:, None]
    if SPLIT > 1:
        here = parts_ptr + (part * T + toks).to(tl.int64)[None, :] * N + outputs[:, None]
        tl.store(here, acc, mask=live[:, None] & in_x[None, :])
    else:
        finish_rows(
            acc, block, bias_ptr, residual_ptr, y_ptr, toks[None, :], in_x[None, :],
            N, y_stride, residual_stride, ACTIVATION, GATED, M, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def add_parts_kernel(
    parts_ptr,  # float32 [SPLIT, T, N], as gemm_kernel leaves it
    bias_ptr,
    residual_ptr,
    y_ptr,
    T,
    N,
    y_stride,
    residual_stride,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Adds the parts of a split product in their order, the same sum every time, and goes on where gemm_kernel would
    without a split."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tok = tl.program_id(0)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    outputs = N // 2 if GATED else N
    live = index < outputs
    acc = activate(summed(parts_ptr, bias_ptr, tok, index, live, T, N, SPLIT), ACTIVATION)
    if GATED:
        acc *= summed(parts_ptr, bias_ptr, tok, index + outputs, live, T, N, SPLIT)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + tok * residual_stride + index, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr + tok * y_stride + index, acc.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def summed(parts_ptr, bias_ptr, tok, index, live, T, N, SPLIT: tl.constexpr):
    acc = tl.zeros(index.shape, tl.float32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(parts_ptr + (part * T + tok).to(tl.int64) * N + index, mask=live, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + index, mask=live, other=0.0).to(tl.float32)
    return acc
