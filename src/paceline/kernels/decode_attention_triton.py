"""The kernel of kernels/decode_attention.py, which has the legend and launches it. This module imports Triton: import
it where Triton is.

Keys are the left operand of the products, so that the few queries that share a key head are columns, of which the
matrix unit takes 8; of a left operand it takes 16 rows. A program has X = ROW_TILE of these queries, its split of one
request's context, and N keys of it at a time.
"""

# Triton kernels have no annotations: mypy checks what is around them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from paceline.kernels.gemv_triton import tanh
from paceline.kernels.prefetch_triton import LINE_BYTES, prefetch_l2
from paceline.kernels.rope_kv_triton import load_turned

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(k, q, D_TILE: tl.constexpr):
    """[N, D_TILE] by [D_TILE, X]. Float32 is summed one term after another, and sums of 32 at a time lose fewer digits:
    without them the error of one query and heads of 256 is 2.1 times that of torch's product."""
    PART: tl.constexpr = 32
    if k.dtype == tl.float32 and D_TILE > PART:
        k_parts = tl.permute(tl.reshape(k, [k.shape[0], D_TILE // PART, PART]), 1, 0, 2)
        q_parts = tl.reshape(q, [D_TILE // PART, PART, q.shape[1]])
        products = tl.sum(tl.dot(k_parts, q_parts, input_precision="ieee"), 0)
    else:
        products = tl.dot(k, q, input_precision="ieee")
    return products


@triton.jit
def log2_scores(products, scale, slope, distance, seen, SOFT_CAP: tl.constexpr, has_slopes: tl.constexpr):
    """Scores times log2(e), -inf where a query does not see the key: 2**them are the weights."""
    if SOFT_CAP > 0.0:
        scores = tanh(products * (scale / SOFT_CAP)) * (SOFT_CAP * LOG2_E)
    else:
        scores = products * (scale * LOG2_E)
    if has_slopes:
        scores -= slope * LOG2_E * distance.to(tl.float32)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def softmax_base(top):
    """What weights are taken relative to. Rows that have seen no key yet: 0, since -inf - -inf is no number."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def reciprocal(total):
    """1 for a row that saw no key, whose values are 0."""
    return 1.0 / tl.where(total > 0.0, total, 1.0)


@triton.jit
def key_slots(tables_ptr, first, end, BLOCK_SIZE: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr):
    """Where the N cached keys from position `first` on lie; from `end` on, and where a window has passed, some slot
    that is there."""
    if N % BLOCK_SIZE == 0:  # one look-up a block
        base = first + tl.arange(0, N // BLOCK_SIZE) * BLOCK_SIZE
        block = tl.load(tables_ptr + base // BLOCK_SIZE, mask=base < end, other=0)
        slot = tl.reshape(block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :], [N])
    else:
        key = first + tl.arange(0, N)
        block = tl.load(tables_ptr + key // BLOCK_SIZE, mask=key < end, other=0)
        slot = block * BLOCK_SIZE + key % BLOCK_SIZE
    if WIDE:
        slot = slot.to(tl.int64)
    return slot


@triton.jit
def _prefetch(cache_ptr, slot, D: tl.constexpr, D_TILE: tl.constexpr):
    """Asks for the rows of slots and does not wait: all of their lines come into the L2."""
    LINE: tl.constexpr = LINE_BYTES * 8 // cache_ptr.dtype.element_ty.primitive_bitwidth
    line = tl.arange(0, (D_TILE + LINE - 1) // LINE) * LINE
    prefetch_l2(cache_ptr + slot[:, None] * D + tl.minimum(line, D - 1)[None, :])


@triton.jit
def _attend_new(
    q, request, query, length, heads, head, writes, qkv_ptr, weight_ptr, cos_ptr, sin_ptr, slots_ptr, k_ptr, v_ptr,
    scale, slope, eps, token_stride, head_stride,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, has_slopes: tl.constexpr, F: tl.constexpr, CENTRED: tl.constexpr,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr,
):  # fmt: skip
    """The step's own keys, turned here and, where `writes`, put into the cache: the largest score of each query [X],
    the sum of its weights, and that of the weighted values [D_TILE, X]."""
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    dims = tl.arange(0, D_TILE)[:, None]
    top = tl.full(query.shape, float("-inf"), tl.float32)
    total = tl.zeros(query.shape, tl.float32)
    values = tl.zeros(q.shape, tl.float32)
    for j in tl.range(0, QUERIES):
        token = request * QUERIES + j
        x_ptr = qkv_ptr + token.to(tl.int64) * token_stride + (heads + head) * head_stride
        k = load_turned(x_ptr, weight_ptr, cos_ptr, sin_ptr, token * F, True, eps, D, D_TILE, F, CENTRED).to(DTYPE)
        v = tl.load(x_ptr + heads // GROUP * head_stride + dims, mask=dims < D, other=0.0)
        slot = tl.load(slots_ptr + token)
        if writes & (slot >= 0):
            tl.store(k_ptr + slot * D + dims, k, mask=dims < D)
            tl.store(v_ptr + slot * D + dims, v, mask=dims < D)
        distance = query - j
        seen = (distance >= 0) & (length > 0)
        if WINDOW > 0:
            seen = seen & (distance < WINDOW)
        products = tl.sum(q.to(tl.float32) * k.to(tl.float32), 0)
        scores = log2_scores(products, scale, slope, distance, seen, SOFT_CAP, has_slopes)
        new_top = tl.maximum(top, scores)
        shrink, weight = tl.exp2(top - softmax_base(new_top)), tl.exp2(scores - softmax_base(new_top))
        values = values * shrink[None, :] + v.to(tl.float32) * weight[None, :]
        total = total * shrink + weight
        top = new_top
    return top, total, values


@triton.jit
def _attend_cached(
    q, top, total, values, position, k_ptr, v_ptr, tables_ptr, low, begin, end, scale, slope,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, has_slopes: tl.constexpr,
    QUERIES: tl.constexpr, N: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The same sums with the cached keys of positions begin .. end - 1, those before `low` left out."""
    dims = tl.arange(0, D_TILE)
    for first in tl.range(begin, end, N, num_stages=STAGES):
        key = first + tl.arange(0, N)
        own = (key >= low) & (key < end)
        at = key_slots(tables_ptr, first, end, BLOCK_SIZE, N, WIDE) * D
        # A slot that is not the request's own may hold anything, NaN too. A key there makes a score that is not used;
        # a value would be added, times 0: it is not read.
        if D == D_TILE:
            k = tl.load(k_ptr + at[:, None] + dims[None, :])
            v = tl.load(v_ptr + at[None, :] + dims[:, None], mask=own[None, :], other=0.0)
        else:
            k = tl.load(k_ptr + at[:, None] + dims[None, :], mask=(dims < D)[None, :], other=0.0)
            v = tl.load(v_ptr + at[None, :] + dims[:, None], mask=own[None, :] & (dims < D)[:, None], other=0.0)
        distance = position[None, :] - key[:, None]
        seen = own[:, None]
        if QUERIES > 1:
            seen = seen & (distance >= 0)
        if WINDOW > 0:
            seen = seen & (distance < WINDOW)
        products = _dot(k, q, D_TILE)
        scores = log2_scores(products, scale, slope[None, :], distance, seen, SOFT_CAP, has_slopes)
        new_top = tl.maximum(top, tl.max(scores, 0))
        weights = tl.exp2(scores - softmax_base(new_top)[None, :])
        shrink = tl.exp2(top - softmax_base(new_top))
        total = total * shrink + tl.sum(weights, 0)
        values = tl.dot(v, weights.to(v.dtype), values * shrink[None, :], input_precision="ieee")
        top = new_top
    return top, total, values


@triton.jit
def _merge(
    parts_ptr, tops_ptr, splits, row, inside,
    CHUNK: tl.constexpr, SPLITS: tl.constexpr, ROW_TILE: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr,
):  # fmt: skip
    """Rows `row` [X] of the mean of the splits' values, always in the same order: [X, D_TILE]."""
    dims = tl.arange(0, D_TILE)
    top = tl.full(row.shape, float("-inf"), tl.float32)
    total = tl.zeros(row.shape, tl.float32)
    value = tl.zeros([row.shape[0], D_TILE], tl.float32)
    for first in tl.range(0, splits, CHUNK):
        split = first + tl.arange(0, CHUNK)
        at = tops_ptr + row[:, None] * SPLITS + split[None, :]
        used = inside[:, None] & (split < splits)[None, :]
        # Past the L1, which other programs' stores do not reach.
        tops = tl.load(at, mask=used, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(at + ROW_TILE * SPLITS, mask=used, other=0.0, cache_modifier=".cg")
        values = tl.load(
            parts_ptr + (split[:, None, None] * ROW_TILE + row[None, :, None]) * D + dims[None, None, :],
            mask=(split < splits)[:, None, None] & inside[None, :, None] & (dims < D)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(tops, 1))
        weights = tl.exp2(tops - softmax_base(new_top)[:, None])
        shrink = tl.exp2(top - softmax_base(new_top))
        total = total * shrink + tl.sum(totals * weights, 1)
        value = value * shrink[:, None] + tl.sum(values * tl.trans(weights)[:, :, None], 0)
        top = new_top
    return value * reciprocal(total)[:, None]


@triton.jit(do_not_specialize=["table_stride"])
def attend(
    q_ptr,  # [T, H, D]; FRESH: [T, H + 2 K, D], queries, keys and values, neither normed nor turned
    cos_ptr,  # the angles of FRESH tokens, [T, F]
    sin_ptr,
    q_weight_ptr,  # norms of FRESH queries and keys, [D]; None: none
    k_weight_ptr,
    slots_ptr,  # where FRESH keys and values go, [T]; negative: nowhere
    k_ptr,
    v_ptr,
    tables_ptr,
    lens_ptr,
    slopes_ptr,
    parts_ptr,  # float32 [R, K, row tiles, SPLITS, ROW_TILE, D]: sums of weight times value
    tops_ptr,  # float32 [R, K, row tiles, 2, ROW_TILE, SPLITS]: the largest score, and the sum of the weights
    counts_ptr,  # int32 [R, K, row tiles]: splits that are done; 0 between calls
    out_ptr,
    scale,
    eps,
    q_token_stride,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FRESH: tl.constexpr,
    F: tl.constexpr,
    CENTRED: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,  # splits merged at a time
    MERGED_ROWS: tl.constexpr,  # rows merged at a time
    TILES_A_SPLIT: tl.constexpr,
    KEY_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_TILES: tl.constexpr,
    ROW_TILE: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    WIDE: tl.constexpr,  # an offset in the cache may pass 2**31
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One split of one request, for ROW_TILE of the queries that share a key head. The last split of them that is done
    merges all."""
    ROWS: tl.constexpr = QUERIES * GROUP
    split, head, request = tl.program_id(0), tl.program_id(1) // ROW_TILES, tl.program_id(2)
    heads, row_tile = tl.num_programs(1) // ROW_TILES * GROUP, tl.program_id(1) % ROW_TILES
    length = tl.load(lens_ptr + request)
    # Of the cached keys, this step's are the previous kernel's or, FRESH, not there yet.
    cached = length
    if FRESH:
        cached -= QUERIES
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - QUERIES - WINDOW + 1, 0)  # the first position that any query sees
    first_tile = low // KEY_TILE
    tiles = tl.cdiv(cached, KEY_TILE) - first_tile
    tiles_here = tl.maximum(tl.cdiv(tiles, SPLITS), TILES_A_SPLIT)
    splits = tl.maximum(tl.cdiv(tiles, tiles_here), 1)
    begin = (first_tile + split * tiles_here) * KEY_TILE
    end = tl.minimum(begin + tiles_here * KEY_TILE, cached)
    k_ptr += head.to(tl.int64) * k_head_stride
    v_ptr += head.to(tl.int64) * v_head_stride
    tables_ptr += request * table_stride
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH > 0 and split < splits:
            asked = key_slots(tables_ptr, begin, end, BLOCK_SIZE, PREFETCH * KEY_TILE, WIDE)
            _prefetch(k_ptr, asked, D, D_TILE)
            _prefetch(v_ptr, asked, D, D_TILE)
        tl.extra.cuda.gdc_wait()
    if split >= splits:
        return

    dims = tl.arange(0, D_TILE)
    rows = row_tile * ROW_TILE + tl.arange(0, ROW_TILE)
    query, query_head, live = rows // GROUP, head * GROUP + rows % GROUP, rows < ROWS
    token = request * QUERIES + query
    q_ptrs = q_ptr + token.to(tl.int64) * q_token_stride + query_head * q_head_stride
    slope = tl.zeros([ROW_TILE], tl.float32)
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + query_head, mask=live, other=0.0)
    top = tl.full([ROW_TILE], float("-inf"), tl.float32)
    total = tl.zeros([ROW_TILE], tl.float32)
    values = tl.zeros([D_TILE, ROW_TILE], tl.float32)
    if FRESH:
        angles_at = request * F if QUERIES == 1 else (token * F)[None, :]
        q = load_turned(
            q_ptrs[None, :], q_weight_ptr, cos_ptr, sin_ptr, angles_at, live[None, :], eps, D, D_TILE, F, CENTRED
        ).to(k_ptr.dtype.element_ty)
        if split == 0:
            top, total, values = _attend_new(
                q, request, query, length, heads, head, row_tile == 0, q_ptr, k_weight_ptr, cos_ptr, sin_ptr, slots_ptr,
                k_ptr, v_ptr, scale, slope, eps, q_token_stride, q_head_stride,
                WINDOW, SOFT_CAP, slopes_ptr is not None, F, CENTRED, QUERIES, GROUP, D, D_TILE,
            )  # fmt: skip
    else:
        q = tl.load(q_ptrs[None, :] + dims[:, None], mask=live[None, :] & (dims < D)[:, None], other=0.0)
    top, total, values = _attend_cached(
        q, top, total, values, length - QUERIES + query, k_ptr, v_ptr, tables_ptr, low, begin, end, scale, slope,
        BLOCK_SIZE, WINDOW, SOFT_CAP, slopes_ptr is not None, QUERIES, KEY_TILE, D, D_TILE, WIDE, STAGES,
    )  # fmt: skip

    out_ptrs = out_ptr + (token.to(tl.int64) * heads + query_head) * D
    mask = live[None, :] & (dims < D)[:, None]
    if splits == 1:
        values *= reciprocal(total)[None, :]
        tl.store(out_ptrs[None, :] + dims[:, None], values.to(out_ptr.dtype.element_ty), mask=mask)
        return
    place = request * tl.num_programs(1) + tl.program_id(1)
    parts_ptr += place.to(tl.int64) * (SPLITS * ROW_TILE * D)
    tops_ptr += place.to(tl.int64) * (2 * ROW_TILE * SPLITS)
    row = tl.arange(0, ROW_TILE)
    tl.store(parts_ptr + (split * ROW_TILE + row)[None, :] * D + dims[:, None], values, mask=mask)
    tl.store(tops_ptr + row * SPLITS + split, top)
    tl.store(tops_ptr + (ROW_TILE + row) * SPLITS + split, total)
    tl.debug_barrier()  # the release by the thread that counts covers what the others wrote
    if tl.atomic_add(counts_ptr + place, 1, sem="acq_rel") < splits - 1:
        return
    tl.store(counts_ptr + place, 0)
    for first in tl.range(0, tl.minimum(ROW_TILE, ROWS - row_tile * ROW_TILE), MERGED_ROWS):
        merged_row = first + tl.arange(0, MERGED_ROWS)
        of_head = row_tile * ROW_TILE + merged_row
        merged = _merge(parts_ptr, tops_ptr, splits, merged_row, of_head < ROWS, CHUNK, SPLITS, ROW_TILE, D, D_TILE)
        at = (request * QUERIES + of_head // GROUP).to(tl.int64) * heads + head * GROUP + of_head % GROUP
        tl.store(
            out_ptr + at[:, None] * D + dims[None, :],
            merged.to(out_ptr.dtype.element_ty),
            mask=(of_head < ROWS)[:, None] & (dims < D)[None, :],
        )
