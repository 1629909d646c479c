"""The kernel of kernels/flash_attention.py, which has the legend and launches it. This module imports Triton: import it
where Triton is.

A program has ROW_TILE queries of one sequence and one head, and N keys of that sequence at a time.
"""

# Triton kernels have no annotations: mypy checks what is around them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from paceline.kernels.decode_attention_triton import LOG2_E, reciprocal, softmax_base
from paceline.kernels.varlen_attention_triton import find_tile


@triton.jit
def _scan(mask_ptr, mask_key_stride, L, SCAN: tl.constexpr):
    """The first key that counts and the one after the last; nothing in between where none does."""
    key = tl.arange(0, SCAN)
    counts = tl.load(mask_ptr + key * mask_key_stride, mask=key < L, other=0) != 0
    return tl.min(tl.where(counts, key, SCAN), 0), tl.max(tl.where(counts, key + 1, 0), 0)


@triton.jit
def _attend_tiles(
    q, top, total, values, position, row_inside, k_ptr, v_ptr, mask_ptr, place_ptr, bias_rows, begin, end, low, last,
    scale, k_stride, v_stride, mask_key_stride, bias_key_stride,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BIAS: tl.constexpr, has_mask: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The largest score of each row, the sum of its weights and that of the weighted values [ROW_TILE, D_TILE], with
    keys begin .. end - 1 added, of which low .. last - 1 may be read. Not MASKED: all of them may, and every row sees
    them all but for the bias."""
    # A bias is added before anything is taken to base 2: times log2(e), the lowest number of its dtype is none.
    UNIT: tl.constexpr = LOG2_E if BIAS == "added" else 1.0
    dims = tl.arange(0, D_TILE)[None, :]
    for first in tl.range(begin, end, N, num_stages=STAGES):
        key = first + tl.arange(0, N)
        inside = (key >= low) & (key < last)
        at_k, at_v = key[:, None] * k_stride + dims, key[:, None] * v_stride + dims
        if MASKED:
            k = tl.load(k_ptr + at_k, mask=inside[:, None] & (dims < D), other=0.0)
            v = tl.load(v_ptr + at_v, mask=inside[:, None] & (dims < D), other=0.0)
        elif D == D_TILE:
            k, v = tl.load(k_ptr + at_k), tl.load(v_ptr + at_v)
        else:
            k = tl.load(k_ptr + at_k, mask=dims < D, other=0.0)
            v = tl.load(v_ptr + at_v, mask=dims < D, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if BIAS != "none":
            at_bias = bias_rows[:, None] + key[None, :] * bias_key_stride
            bias = tl.load(at_bias, mask=row_inside[:, None] & inside[None, :], other=0)
            if BIAS == "added":
                scores += bias.to(tl.float32)
            else:
                scores = tl.where(bias != 0, scores, float("-inf"))
        if MASKED:
            seen = inside[None, :]
            if has_mask:
                counts = tl.load(mask_ptr + key * mask_key_stride, mask=inside, other=0) != 0
                seen = seen & counts[None, :]
            place = key
            if place_ptr is not None:
                place = tl.load(place_ptr + key, mask=inside, other=0)
            distance = position[:, None] - place[None, :]
            if CAUSAL:
                seen = seen & (distance >= 0)
            if WINDOW >= 0:
                seen = seen & (distance <= WINDOW) & (distance >= -WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = softmax_base(new_top)
        weights = tl.exp2((scores - base[:, None]) * UNIT)
        shrink = tl.exp2((top - base) * UNIT)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.dot(weights.to(v.dtype), v, values * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, total, values


# Compiled once for all batches, not for each way in which their numbers and addresses happen to be multiples of 16.
@triton.jit(
    do_not_specialize=["sequences", "queries", "num_keys", "offset"],
    do_not_specialize_on_alignment=["lens_ptr", "mask_ptr", "starts_ptr", "key_starts_ptr", "place_ptr"],
)
def flash_kernel(
    q_ptr,  # [B, S, H, D]; packed: [T, H, D]
    k_ptr,  # [B, L, K, D]; packed: [U, K, D]
    v_ptr,
    out_ptr,  # like q, contiguous
    lens_ptr,  # [B]; None: all L keys
    mask_ptr,  # [B, L]; None: all of them
    bias_ptr,  # [B, H, S, L]; None: none
    starts_ptr,  # int32 [B + 1]: of each sequence's queries in T, and their end; None: not packed
    key_starts_ptr,
    place_ptr,  # int32 [T]: what a window counts; None: from each sequence's first token
    sequences,
    queries,  # S
    num_keys,  # L
    offset,
    scale,
    q_batch_stride,
    q_stride,
    q_head_stride,
    k_batch_stride,
    k_stride,
    k_head_stride,
    v_batch_stride,
    v_stride,
    v_head_stride,
    mask_batch_stride,
    mask_key_stride,
    bias_batch_stride,
    bias_head_stride,
    bias_stride,
    bias_key_stride,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,  # below 0: none
    BIAS: tl.constexpr,  # "none", "added" or "mask"
    SCAN: tl.constexpr,  # L padded, where the mask is looked through first; else 0
    B_TILE: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    head, heads = tl.program_id(0), tl.num_programs(0)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if starts_ptr is None:
        tiles = tl.cdiv(queries, ROW_TILE)
        sequence, tile = tl.program_id(1) // tiles, tl.program_id(1) % tiles
        first_row = sequence.to(tl.int64) * queries
        q_ptr += sequence.to(tl.int64) * q_batch_stride
        k_ptr += sequence.to(tl.int64) * k_batch_stride
        v_ptr += sequence.to(tl.int64) * v_batch_stride
        last = num_keys
        if lens_ptr is not None:
            last = tl.minimum(tl.load(lens_ptr + sequence).to(tl.int32), num_keys)
    else:
        sequence, tile = find_tile(starts_ptr, sequences, tl.program_id(1), B_TILE, 1, ROW_TILE)
        if tile < 0:
            return
        first_row = tl.load(starts_ptr + sequence).to(tl.int64)
        queries = (tl.load(starts_ptr + sequence + 1) - first_row).to(tl.int32)
        first_key = tl.load(key_starts_ptr + sequence).to(tl.int64)
        last = (tl.load(key_starts_ptr + sequence + 1) - first_key).to(tl.int32)
        q_ptr += first_row * q_stride
        k_ptr += first_key * k_stride
        v_ptr += first_key * v_stride
    k_ptr += head // GROUP * k_head_stride
    v_ptr += head // GROUP * v_head_stride

    dims = tl.arange(0, D_TILE)
    row = tile * ROW_TILE + tl.arange(0, ROW_TILE)
    live = (row < queries)[:, None] & (dims < D)[None, :]
    q = tl.load(q_ptr + row[:, None] * q_stride + head * q_head_stride + dims[None, :], mask=live, other=0.0)
    position = row + offset
    if place_ptr is not None:
        place_ptr += first_row
        position = tl.load(place_ptr + row, mask=row < queries, other=0)
    bias_rows = row
    if BIAS != "none":
        bias_ptr += sequence.to(tl.int64) * bias_batch_stride + head.to(tl.int64) * bias_head_stride
        bias_rows = bias_ptr + row * bias_stride
    if BIAS != "added":
        scale *= LOG2_E

    # Keys low .. last - 1 are those that some row may see; of them every row sees whole .. whole_end - 1.
    earliest, latest = tile * ROW_TILE + offset, tl.minimum(tile * ROW_TILE + ROW_TILE, queries) - 1 + offset
    low, whole = 0, 0
    if SCAN > 0:
        low, scanned = _scan(mask_ptr + sequence.to(tl.int64) * mask_batch_stride, mask_key_stride, num_keys, SCAN)
        last = tl.minimum(last, scanned)
    whole_end = last
    if CAUSAL:
        last = tl.minimum(last, latest + 1)
        whole_end = tl.minimum(whole_end, earliest + 1)
    if WINDOW >= 0:
        low = tl.maximum(low, earliest - WINDOW)
        last = tl.minimum(last, latest + WINDOW + 1)
        whole = tl.cdiv(tl.maximum(latest - WINDOW, 0), KEY_TILE) * KEY_TILE
        whole_end = tl.minimum(whole_end, earliest + WINDOW + 1)
    begin = tl.maximum(low, 0) // KEY_TILE * KEY_TILE
    if mask_ptr is not None:
        mask_ptr += sequence.to(tl.int64) * mask_batch_stride
        whole_end = begin  # none
        whole = begin
    if place_ptr is not None:  # keys as near as they may be among the packed were farther where something was left out
        whole_end = begin
        whole = begin
    whole = tl.maximum(whole, begin)
    whole_end = tl.maximum(whole_end // KEY_TILE * KEY_TILE, whole)
    top = tl.full([ROW_TILE], float("-inf"), tl.float32)
    total = tl.zeros([ROW_TILE], tl.float32)
    values = tl.zeros([ROW_TILE, D_TILE], tl.float32)
    if WINDOW >= 0 and mask_ptr is None and place_ptr is None:
        top, total, values = _attend_tiles(
            q, top, total, values, position, row < queries, k_ptr, v_ptr, mask_ptr, place_ptr, bias_rows, begin,
            tl.minimum(whole, last), low, last, scale, k_stride, v_stride, mask_key_stride, bias_key_stride,
            True, CAUSAL, WINDOW, BIAS, mask_ptr is not None, KEY_TILE, D, D_TILE, STAGES,
        )  # fmt: skip
    if mask_ptr is None and place_ptr is None:
        top, total, values = _attend_tiles(
            q, top, total, values, position, row < queries, k_ptr, v_ptr, mask_ptr, place_ptr, bias_rows, whole,
            whole_end, low, last, scale, k_stride, v_stride, mask_key_stride, bias_key_stride,
            False, CAUSAL, WINDOW, BIAS, mask_ptr is not None, KEY_TILE, D, D_TILE, STAGES,
        )  # fmt: skip
    top, total, values = _attend_tiles(
        q, top, total, values, position, row < queries, k_ptr, v_ptr, mask_ptr, place_ptr, bias_rows, whole_end,
        last, low, last, scale, k_stride, v_stride, mask_key_stride, bias_key_stride,
        True, CAUSAL, WINDOW, BIAS, mask_ptr is not None, KEY_TILE, D, D_TILE, STAGES,
    )  # fmt: skip
    values *= reciprocal(total)[:, None]
    out_ptrs = out_ptr + ((first_row + row) * heads + head)[:, None] * D + dims[None, :]
    tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=live)
