"""The kernels of kernels/split_attention.py, which has the legend and launches them. This module imports Triton: import
it where Triton is.

Nothing is multiplied on the matrix unit, which takes 16 rows: a key's product with a query is a sum over the head. Each
of a tile's N places keeps a softmax of its own, so that programs meet only at the end.
"""

# Triton kernels have no annotations: mypy checks what is around them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.kernels.decode_attention_triton import LOG2_E, reciprocal, softmax_base


# Compiled once for all numbers of keys, and for masks and biases wherever they begin.
@triton.jit(
    do_not_specialize=["num_keys", "keys_a_split"],
    do_not_specialize_on_alignment=["mask_ptr", "bias_ptr"],
)
def split_kernel(
    q_ptr,  # [B, S, H, D]
    k_ptr,  # [B, L, K, D]
    v_ptr,
    out_ptr,  # [B, S, H, D], contiguous; written where there is one split
    parts_ptr,  # float32 [B * K, splits, X, D + 2]: weighted values, their largest score and the sum of weights
    mask_ptr,  # [B, L]; None: all keys count
    bias_ptr,  # [B, H, S, L]; None: none
    num_keys,  # L
    keys_a_split,  # a multiple of N
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
    BIAS: tl.constexpr,  # "none", "added" or "mask"
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that share a key head
    QUERIES: tl.constexpr,  # S
    X: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    pair, split = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (pair // KV_HEADS).to(tl.int64), pair % KV_HEADS
    row = tl.arange(0, X)
    live = row < GROUP * QUERIES
    head, query = kv_head * GROUP + row // QUERIES, row % QUERIES
    dims = tl.arange(0, D_TILE)[None, None, :]
    in_head = dims < D
    at_q = (query * q_stride + head * q_head_stride)[None, :, None] + dims
    q = tl.load(q_ptr + batch * q_batch_stride + at_q, mask=live[None, :, None] & in_head, other=0.0).to(tl.float32)
    k_ptr += batch * k_batch_stride + kv_head * k_head_stride
    v_ptr += batch * v_batch_stride + kv_head * v_head_stride
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch_stride
    if BIAS != "none":
        bias_rows = bias_ptr + batch * bias_batch_stride + (head * bias_head_stride + query * bias_stride)[None, :]
    # A bias is added before anything is taken to base 2: times log2(e), the lowest number of its dtype is none.
    UNIT: tl.constexpr = LOG2_E if BIAS == "added" else 1.0
    if BIAS != "added":
        scale *= LOG2_E
    top = tl.full([N, X], float("-inf"), tl.float32)
    total = tl.zeros([N, X], tl.float32)
    values = tl.zeros([N, X, D_TILE], tl.float32)
    begin = split * keys_a_split
    end = tl.minimum(begin + keys_a_split, num_keys)
    for first in tl.range(begin, end, N, num_stages=STAGES):
        key = first + tl.arange(0, N)
        inside = key < end
        loaded = inside[:, None, None] & in_head
        k = tl.load(k_ptr + key[:, None, None].to(tl.int64) * k_stride + dims, mask=loaded, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + key[:, None, None].to(tl.int64) * v_stride + dims, mask=loaded, other=0.0).to(tl.float32)
        scores = tl.sum(q * k, 2) * scale
        seen = inside[:, None]
        if mask_ptr is not None:
            seen = seen & (tl.load(mask_ptr + key * mask_key_stride, mask=inside, other=0) != 0)[:, None]
        if BIAS != "none":
            at_bias = bias_rows + key[:, None] * bias_key_stride
            bias = tl.load(at_bias, mask=inside[:, None] & live[None, :], other=0)
            if BIAS == "added":
                scores += bias.to(tl.float32)
            else:
                seen = seen & (bias != 0)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, scores)
        base = softmax_base(new_top)
        weights, shrink = tl.exp2((scores - base) * UNIT), tl.exp2((top - base) * UNIT)
        total = total * shrink + weights
        values = values * shrink[:, :, None] + weights[:, :, None] * v
        top = new_top
    best = tl.max(top, 0)
    share = tl.exp2((top - softmax_base(best)[None, :]) * UNIT)
    total_X = tl.sum(total * share, 0)
    values_XD = tl.sum(values * share[:, :, None], 0)
    dim = tl.arange(0, D_TILE)[None, :]
    stored = live[:, None] & (dim < D)
    if parts_ptr is None:
        values_XD *= reciprocal(total_X)[:, None]
        heads: tl.constexpr = KV_HEADS * GROUP
        out_ptrs = out_ptr + ((batch * QUERIES + query) * heads + head)[:, None] * D + dim
        tl.store(out_ptrs, values_XD.to(out_ptr.dtype.element_ty), mask=stored)
    else:
        part = parts_ptr + ((pair * tl.num_programs(1) + split) * X + row).to(tl.int64) * (D + 2)
        tl.store(part[:, None] + dim, values_XD, mask=stored)
        tl.store(part + D, best, mask=live)
        tl.store(part + D + 1, total_X, mask=live)


@triton.jit
def merge_kernel(
    parts_ptr,  # as split_kernel leaves it
    out_ptr,  # [B, S, H, D], contiguous
    splits,
    BIAS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    X: tl.constexpr,
    SPLITS: tl.constexpr,  # padded
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One row of the result: its splits' means, in their order."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    pair, row = tl.program_id(0), tl.program_id(1)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, D_TILE)
    there = split < splits
    part = parts_ptr + ((pair * splits + split) * X + row).to(tl.int64) * (D + 2)
    top = tl.load(part + D, mask=there, other=float("-inf"))
    total = tl.load(part + D + 1, mask=there, other=0.0)
    values = tl.load(part[:, None] + dim[None, :], mask=there[:, None] & (dim < D)[None, :], other=0.0)
    UNIT: tl.constexpr = LOG2_E if BIAS == "added" else 1.0
    share = tl.exp2((top - softmax_base(tl.max(top, 0))) * UNIT)
    value = tl.sum(values * share[:, None], 0) * reciprocal(tl.sum(total * share, 0))
    batch, head = (pair // KV_HEADS).to(tl.int64), pair % KV_HEADS * GROUP + row // QUERIES
    at = ((batch * QUERIES + row % QUERIES) * KV_HEADS * GROUP + head) * D + dim
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=dim < D)
