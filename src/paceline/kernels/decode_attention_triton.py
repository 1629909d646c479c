"""The two kernels of kernels/decode_attention.py, which has the legend and launches them: a context's splits, and their
merging. This module imports Triton: import it where Triton is.
"""

# Triton kernels have no annotations: mypy checks what is around them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _first_seen(length, WINDOW: tl.constexpr, QUERIES: tl.constexpr):
    """The first position that any query sees."""
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - QUERIES - WINDOW + 1, 0)
    return low


@triton.jit
def _tanh(x):
    """1 - 2 / (1 + e^2x) loses the digits of a small x, which are those of most scores: there the series to x^9."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.09, series, 1 - 2 / (1 + tl.exp(2 * x)))  # e^2x may overflow, to a quotient of 0


@triton.jit
def attend_split(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    lens_ptr,
    slopes_ptr,
    parts_ptr,
    weights_ptr,
    scale,
    q_token_stride,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SPLITS: tl.constexpr,
    KEY_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_TILES: tl.constexpr,
    ROW_TILE: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One split of one request, for the rows that share a key head: their softmax-weighted mean of the values over the
    split's keys, and the logarithm (base 2) of the sum of the weights."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    ROWS: tl.constexpr = QUERIES * GROUP
    split, head, request = tl.program_id(0), tl.program_id(1) // ROW_TILES, tl.program_id(2)
    length = tl.load(lens_ptr + request)
    low = _first_seen(length, WINDOW, QUERIES)
    begin = (low // KEY_TILE + split) * KEY_TILE
    if DEPENDENT:  # queries and the newest keys are the previous kernel's; lengths and tables are older
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if begin >= length:
        return
    dims = tl.arange(0, D_TILE)
    rows = tl.program_id(1) % ROW_TILES * ROW_TILE + tl.arange(0, ROW_TILE)
    query, query_head = rows // GROUP, head * GROUP + rows % GROUP
    position = length - QUERIES + query
    q = tl.load(
        q_ptr + ((request * QUERIES + query) * q_token_stride + query_head * q_head_stride)[:, None] + dims[None, :],
        mask=(rows < ROWS)[:, None] & (dims < D)[None, :],
        other=0.0,
    )
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + query_head, mask=rows < ROWS, other=0.0)
    k_head_ptr = k_ptr + head.to(tl.int64) * k_head_stride
    v_head_ptr = v_ptr + head.to(tl.int64) * v_head_stride
    top = tl.full([ROW_TILE], float("-inf"), tl.float32)
    total = tl.zeros([ROW_TILE], tl.float32)
    values = tl.zeros([ROW_TILE, D_TILE], tl.float32)
    for first in tl.range(begin, length, SPLITS * KEY_TILE, num_stages=STAGES):
        key = first + tl.arange(0, KEY_TILE)
        own = (key >= low) & (key < length)  # other slots may hold anything, NaN too: they are never read
        block = tl.load(tables_ptr + request * table_stride + key // BLOCK_SIZE, mask=own, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
        k = tl.load(k_head_ptr + slot[None, :] * D + dims[:, None], mask=own[None, :] & (dims < D)[:, None], other=0.0)
        v = tl.load(v_head_ptr + slot[:, None] * D + dims[None, :], mask=own[:, None] & (dims < D)[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if SOFT_CAP > 0.0:
            scores = SOFT_CAP * _tanh(scores / SOFT_CAP)
        if slopes_ptr is not None:
            scores -= slope[:, None] * (position[:, None] - key[None, :]).to(tl.float32)
        seen = own[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores * LOG2_E, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key yet: no -inf - -inf
        probs = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(probs, 1)
        values = values * shrink[:, None] + tl.dot(probs.to(v.dtype), v, input_precision="ieee")
        top = new_top
    part = ((request * tl.num_programs(1) // ROW_TILES + head) * SPLITS + split) * ROWS + rows
    total = tl.where(total > 0.0, total, 1.0)  # a row that sees no key of this split: mean 0, weight 2**-inf
    tl.store(
        parts_ptr + part.to(tl.int64)[:, None] * D + dims[None, :],
        values / total[:, None],
        mask=(rows < ROWS)[:, None] & (dims < D)[None, :],
    )
    tl.store(weights_ptr + part, top + tl.log2(total), mask=rows < ROWS)


@triton.jit
def merge_splits(
    parts_ptr,
    weights_ptr,
    lens_ptr,
    out_ptr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    KEY_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    S_TILE: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One row of the result: the mean of its splits, weighted by their sums, always in the same order."""
    ROWS: tl.constexpr = QUERIES * GROUP
    row, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lens_ptr + request)
    first_tile = _first_seen(length, WINDOW, QUERIES) // KEY_TILE
    split = tl.arange(0, S_TILE)
    used = (split < SPLITS) & ((first_tile + split) * KEY_TILE < length)  # nothing was written for the others
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    dims = tl.arange(0, D_TILE)
    part = ((request * tl.num_programs(1) + head) * SPLITS + split) * ROWS + row
    weight = tl.load(weights_ptr + part, mask=used, other=float("-inf"))
    means = tl.load(
        parts_ptr + part.to(tl.int64)[:, None] * D + dims[None, :],
        mask=used[:, None] & (dims < D)[None, :],
        other=0.0,
    )
    top = tl.max(weight, 0)
    weight = tl.exp2(weight - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    result = tl.sum(means * weight[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    token, query_head = request * QUERIES + row // GROUP, head * GROUP + row % GROUP
    out = out_ptr + (token.to(tl.int64) * tl.num_programs(1) * GROUP + query_head) * D + dims
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=dims < D)
