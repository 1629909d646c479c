# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The kernels of kernels/invariant.py, which has the shapes and launches them. This module imports Triton: import it
where Triton is.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Tiles of rows that share the tiles of the weight they read through the L2, before the next tiles of it are taken.
T_TILES_TOGETHER = tl.constexpr(16)


@triton.jit
def _sum_piece(x_ptrs, w_ptrs, piece, T_TILE: tl.constexpr, N_TILE: tl.constexpr, K_TILE: tl.constexpr,
               K: tl.constexpr, PIECE: tl.constexpr):  # fmt: skip
    """The products over K of piece * PIECE .. (piece + 1) * PIECE - 1, in order."""
    sums = tl.zeros([T_TILE, N_TILE], tl.float32)
    for k_first in tl.range(piece * PIECE, tl.minimum(piece * PIECE + PIECE, K), K_TILE):
        k = k_first + tl.arange(0, K_TILE)
        if K % K_TILE == 0:
            x, w = tl.load(x_ptrs + k[None, :]), tl.load(w_ptrs + k[None, :])
        else:
            x = tl.load(x_ptrs + k[None, :], mask=(k < K)[None, :], other=0.0)
            w = tl.load(w_ptrs + k[None, :], mask=(k < K)[None, :], other=0.0)
        sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["tokens"])
def multiply(
    x_ptr,  # [T, K], rows x_stride apart
    weight_ptr,  # [N, K], contiguous
    bias_ptr,  # [N]; None: none
    y_ptr,  # [T, N], contiguous; APART: float32 [PIECES, T, N]
    tokens,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,  # of K
    APART: tl.constexpr,  # a piece a program, for add_pieces; else all of them here, added in the same order
    T_TILE: tl.constexpr,
    N_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """T_TILE x N_TILE of y."""
    program, n_tiles = tl.program_id(0), tl.cdiv(N, N_TILE)
    t_tiles = tl.cdiv(tokens, T_TILE)
    first = program // (T_TILES_TOGETHER * n_tiles) * T_TILES_TOGETHER
    together = tl.minimum(t_tiles - first, T_TILES_TOGETHER)
    inside = program % (T_TILES_TOGETHER * n_tiles)
    t = (first + inside % together) * T_TILE + tl.arange(0, T_TILE)
    n = inside // together * N_TILE + tl.arange(0, N_TILE)
    # Rows past the end are read as others', and not stored: a mask would cost every load, and mix nothing.
    x_ptrs = x_ptr + tl.minimum(t, tokens - 1).to(tl.int64)[:, None] * x_stride
    w_ptrs = weight_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    y_ptrs = y_ptr + t.to(tl.int64)[:, None] * N + n[None, :]
    if APART:
        piece = tl.program_id(1)
        sums = _sum_piece(x_ptrs, w_ptrs, piece, T_TILE, N_TILE, K_TILE, K, PIECE)
        y_ptrs += piece.to(tl.int64) * tokens * N
    else:
        sums = tl.zeros([T_TILE, N_TILE], tl.float32)
        for piece in tl.range(0, PIECES):
            sums += _sum_piece(x_ptrs, w_ptrs, piece, T_TILE, N_TILE, K_TILE, K, PIECE)
        if bias_ptr is not None:
            sums += tl.load(bias_ptr + tl.minimum(n, N - 1)).to(tl.float32)[None, :]
    tl.store(y_ptrs, sums.to(y_ptr.dtype.element_ty), mask=(t < tokens)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def add_pieces(
    parts_ptr,  # float32 [PIECES, T, N]
    bias_ptr,
    y_ptr,
    tokens,
    N: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for piece in tl.static_range(PIECES):
        sums += tl.load(parts_ptr + (piece * tokens + row) * N + n, mask=n < N, other=0.0)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + n, sums.to(y_ptr.dtype.element_ty), mask=n < N)
