"""The kernel of kernels/varlen_attention.py, which has the legend and launches it. This module imports Triton: import
it where Triton is.

A program has X = ROW_TILE rows, each a query of one request in one of the heads that share a key head, and N keys of
that request at a time.
"""

# Triton kernels have no annotations: mypy checks what is around them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from paceline.kernels.decode_attention_triton import key_slots, log2_scores, reciprocal, softmax_base


@triton.jit
def find_tile(starts_ptr, requests, program,
               R_TILE: tl.constexpr, GROUP: tl.constexpr, ROW_TILE: tl.constexpr):  # fmt: skip
    """Of the step's tiles, the `program`-th from the end: its request, and its number within it; below 0: there is
    none. From the end, since a prompt's last queries see the most keys, and the longest work should start first."""
    index = tl.arange(0, R_TILE)
    inside = index < requests
    first = tl.load(starts_ptr + index, mask=inside, other=0)
    end = tl.load(starts_ptr + index + 1, mask=inside, other=0)
    tiles = tl.cdiv((end - first) * GROUP, ROW_TILE)
    tile = tl.sum(tiles, 0) - 1 - program
    before = tl.cumsum(tiles, 0) <= tile  # requests whose tiles are all before it
    return tl.sum(before.to(tl.int32), 0), tile - tl.sum(tl.where(before, tiles, 0), 0)


@triton.jit
def _attend_tiles(
    q, top, total, values, position, k_ptr, v_ptr, tables_ptr, low, begin, end, last, scale, slope,
    MASKED: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    has_slopes: tl.constexpr, N: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The largest score of each row [X], the sum of its weights and that of the weighted values [X, D_TILE], with the
    keys of positions begin .. end - 1 added, of which those of low .. last - 1 are the tile's own. Not MASKED: all of
    them are, and every row sees them all; the sums are the same to the bit."""
    dims = tl.arange(0, D_TILE)
    for first in tl.range(begin, end, N, num_stages=STAGES):
        key = first + tl.arange(0, N)
        at = key_slots(tables_ptr, first, last, BLOCK_SIZE, N, WIDE)[:, None] * D + dims[None, :]
        own = (key >= low) & (key < last)
        # What a slot that is not the request's own holds may be NaN. A key there makes a score that is not used; a
        # value would be added, times 0: it is not read.
        if MASKED:
            k = tl.load(k_ptr + at, mask=(dims < D)[None, :], other=0.0)
            v = tl.load(v_ptr + at, mask=own[:, None] & (dims < D)[None, :], other=0.0)
        elif D == D_TILE:
            k, v = tl.load(k_ptr + at), tl.load(v_ptr + at)
        else:
            k = tl.load(k_ptr + at, mask=(dims < D)[None, :], other=0.0)
            v = tl.load(v_ptr + at, mask=(dims < D)[None, :], other=0.0)
        distance = position[:, None] - key[None, :]
        seen = tl.full([1, 1], 1, tl.int1)
        if MASKED:
            seen = own[None, :] & (distance >= 0)
            if WINDOW > 0:
                seen = seen & (distance < WINDOW)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = log2_scores(products, scale, slope[:, None], distance, seen, SOFT_CAP, has_slopes)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - softmax_base(new_top)[:, None])
        shrink = tl.exp2(top - softmax_base(new_top))
        total = total * shrink + tl.sum(weights, 1)
        values = tl.dot(weights.to(v.dtype), v, values * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, total, values


# Compiled once for all batches, not for each way in which their numbers and addresses happen to be multiples of 16.
@triton.jit(
    do_not_specialize=["requests", "table_stride"],
    do_not_specialize_on_alignment=["tables_ptr", "lens_ptr", "starts_ptr"],
)
def attend_ragged(
    q_ptr,  # [T, H, D]
    k_ptr,
    v_ptr,
    tables_ptr,  # int32 [R, B]
    lens_ptr,  # int32 [R]
    starts_ptr,  # int32 [R + 1]: of each request's queries in T, and their end
    slopes_ptr,  # float32 [H]; None: none
    out_ptr,  # [T, H, D], contiguous
    requests,
    scale,
    q_token_stride,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    R_TILE: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    WIDE: tl.constexpr,  # an offset in the cache may pass 2**31
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """ROW_TILE rows of one request: all its keys, from the first that some row sees to the last."""
    head, heads = tl.program_id(0), tl.num_programs(0) * GROUP
    request, tile = find_tile(starts_ptr, requests, tl.program_id(1), R_TILE, GROUP, ROW_TILE)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if tile < 0:
        return
    first_token = tl.load(starts_ptr + request)
    queries = tl.load(starts_ptr + request + 1) - first_token
    start = tl.load(lens_ptr + request) - queries  # position of the request's first query
    k_ptr += head.to(tl.int64) * k_head_stride
    v_ptr += head.to(tl.int64) * v_head_stride
    tables_ptr += request.to(tl.int64) * table_stride

    dims = tl.arange(0, D_TILE)
    rows = tile * ROW_TILE + tl.arange(0, ROW_TILE)
    query, query_head = rows // GROUP, head * GROUP + rows % GROUP
    live = (query < queries)[:, None] & (dims < D)[None, :]
    token = (first_token + query).to(tl.int64)
    q_ptrs = q_ptr + token[:, None] * q_token_stride + query_head[:, None] * q_head_stride + dims[None, :]
    q = tl.load(q_ptrs, mask=live, other=0.0)
    slope = tl.zeros([ROW_TILE], tl.float32)
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + query_head)
    position = start + query

    # The positions of the tile's first and last query bound the keys that some row sees, and those that all see.
    earliest = start + tile * ROW_TILE // GROUP
    latest = start + tl.minimum((tile * ROW_TILE + ROW_TILE - 1) // GROUP, queries - 1)
    last = latest + 1
    low, whole = 0, 0
    if WINDOW > 0:
        low = tl.maximum(earliest - WINDOW + 1, 0)
        whole = tl.cdiv(tl.maximum(latest - WINDOW + 1, 0), KEY_TILE) * KEY_TILE
    whole_end = tl.maximum((earliest + 1) // KEY_TILE * KEY_TILE, whole)
    top = tl.full([ROW_TILE], float("-inf"), tl.float32)
    total = tl.zeros([ROW_TILE], tl.float32)
    values = tl.zeros([ROW_TILE, D_TILE], tl.float32)
    if WINDOW > 0:
        top, total, values = _attend_tiles(
            q, top, total, values, position, k_ptr, v_ptr, tables_ptr, low, low // KEY_TILE * KEY_TILE,
            tl.minimum(whole, last), last, scale, slope, True, BLOCK_SIZE, WINDOW, SOFT_CAP, slopes_ptr is not None,
            KEY_TILE, D, D_TILE, WIDE, STAGES,
        )  # fmt: skip
    top, total, values = _attend_tiles(
        q, top, total, values, position, k_ptr, v_ptr, tables_ptr, low, whole, whole_end, last, scale, slope,
        False, BLOCK_SIZE, WINDOW, SOFT_CAP, slopes_ptr is not None, KEY_TILE, D, D_TILE, WIDE, STAGES,
    )  # fmt: skip
    top, total, values = _attend_tiles(
        q, top, total, values, position, k_ptr, v_ptr, tables_ptr, low, whole_end, last, last, scale, slope,
        True, BLOCK_SIZE, WINDOW, SOFT_CAP, slopes_ptr is not None, KEY_TILE, D, D_TILE, WIDE, STAGES,
    )  # fmt: skip
    values *= reciprocal(total)[:, None]
    out_ptrs = out_ptr + (token * heads + query_head)[:, None] * D + dims[None, :]
    tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=live)
