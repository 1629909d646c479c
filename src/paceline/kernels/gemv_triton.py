# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""What the Triton kernels of kernels/gemv.py have in common: which rows of a weight a program has, and what follows the
product.

Shapes: T rows of x, N outputs, K inputs; M columns of the product: the T rows, padded as the matrix unit takes them,
the weight as its left operand. A program owns BLOCK_N rows of the weight.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_w(pointers, at, width, EVEN: tl.constexpr):
    """The weight behind `pointers`, at places `at` of a row; 0 from `width` on, which an odd last step reaches."""
    if EVEN:
        w = tl.load(pointers, eviction_policy="evict_first")
    else:
        w = tl.load(pointers, mask=at < width, other=0.0, eviction_policy="evict_first")
    return w


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
def tanh(x):
    """1 - 2 / (1 + e^2x) loses the digits of a small x, which are those of most scores: there the series to x^9."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.09, series, 1 - 2 / (1 + tl.exp(2 * x)))  # e^2x may overflow, to a quotient of 0


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
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "tanh":
        x = tanh(x)
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return x


@triton.jit
def finish(
    acc, block, scale_ptr, bias_ptr, residual_ptr, y_ptr,
    N, FORMAT: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All that follows the sums over K of one row of x and one block of the weight's rows: column 0 of [BLOCK_N, M].
    Stores y."""
    if FORMAT == "int8" or FORMAT == "fp8":
        rows, _ = block_rows(block, N, GATED, BLOCK_N)
        acc *= tl.load(scale_ptr + rows).to(tl.float32)[:, None]
    toks = tl.arange(0, M)[None, :]
    finish_rows(
        acc, block, bias_ptr, residual_ptr, y_ptr, toks, toks < 1,
        N, 0, 0, ACTIVATION, GATED, M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def finish_rows(
    acc, block, bias_ptr, residual_ptr, y_ptr, toks, live_toks,
    N, y_stride, residual_stride,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same of scaled sums, for the rows `toks`, [1, M], of y, of which `live_toks` exist."""
    index = block * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, live = block_rows(block, N, GATED, BLOCK_N)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_N // 2, 2, M]), [0, 2, 1]))
        acc = activate(gate, ACTIVATION) * up
        index = block * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        live = index < N // 2
    else:
        acc = activate(acc, ACTIVATION)
    live_out = live[:, None] & live_toks
    if residual_ptr is not None:
        at = residual_ptr + toks * residual_stride + index[:, None]
        acc += tl.load(at, mask=live_out, other=0.0).to(tl.float32)
    tl.store(y_ptr + toks * y_stride + index[:, None], acc.to(y_ptr.dtype.element_ty), mask=live_out)
