# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton side of kernels/padding.py, which has the legend."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _counts(mask_ptr, at, end, S, sequence_stride, place_stride):
    """1 where a place, counted through all sequences, has a token; 0 from `end` on."""
    pointers = mask_ptr + (at // S).to(tl.int64) * sequence_stride + at % S * place_stride
    return (tl.load(pointers, mask=at < end, other=0) != 0).to(tl.int32)


@triton.jit(do_not_specialize=["S", "places"], do_not_specialize_on_alignment=["mask_ptr", "count_ptr"])
def count_kernel(
    mask_ptr,  # [B, S]
    count_ptr,  # int32 [1], the host's memory
    sequence_stride,
    place_stride,
    S,
    places,  # B * S
    BLOCK: tl.constexpr,
):
    counts = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, places, BLOCK):
        counts += _counts(mask_ptr, first + tl.arange(0, BLOCK), places, S, sequence_stride, place_stride)
    tl.store(count_ptr, tl.sum(counts, 0))


@triton.jit(do_not_specialize=["B", "S", "bound"], do_not_specialize_on_alignment=["mask_ptr"])
def plan_kernel(
    mask_ptr,  # [B, S]
    starts_ptr,  # int32 [B + 1]
    place_ptr,  # int32 [bound]
    index_ptr,  # int32 [B, S]
    sequence_stride,
    place_stride,
    B,
    S,
    bound,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One sequence: each counts the tokens before it by itself. The last program has none, and marks what is left."""
    sequence = tl.program_id(0)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    before = 0
    for first in tl.range(0, sequence * S, BLOCK):
        at = first + tl.arange(0, BLOCK)
        before += tl.sum(_counts(mask_ptr, at, sequence * S, S, sequence_stride, place_stride), 0)
    tl.store(starts_ptr + sequence, tl.minimum(before, bound))
    if sequence < B:
        end = (sequence + 1) * S
        for first in tl.range(sequence * S, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            token = _counts(mask_ptr, at, end, S, sequence_stride, place_stride)
            index = before + tl.cumsum(token, 0) - 1
            kept = (token > 0) & (index < bound)
            tl.store(place_ptr + index, at, mask=kept)
            tl.store(index_ptr + at, tl.where(kept, index, -1), mask=at < end)
            before += tl.sum(token, 0)
    else:
        for first in tl.range(before, bound, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(place_ptr + at, tl.full([BLOCK], -1, tl.int32), mask=at < bound)


@triton.jit(do_not_specialize=["S"])
def gather_kernel(
    x_ptr,  # [B, S, C]
    rows_ptr,  # int32 [R]
    y_ptr,  # [R, C], contiguous
    S,
    sequence_stride,
    row_stride,
    C,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(rows_ptr + tl.program_id(0))
    x = tl.zeros([BLOCK], x_ptr.dtype.element_ty)
    if row >= 0:
        x_ptr += (row // S).to(tl.int64) * sequence_stride + (row % S).to(tl.int64) * row_stride
        x = tl.load(x_ptr + cols, mask=cols < C, other=0.0)
    tl.store(y_ptr + tl.program_id(0).to(tl.int64) * C + cols, x, mask=cols < C)
