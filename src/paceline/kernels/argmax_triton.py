"""The kernels of kernels/argmax.py, which has the legend and launches them. This module imports Triton: import it where
Triton is.
"""

# Triton kernels have no annotations: mypy checks what is around them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**63))
NAN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def largest_of_part(logits_ptr, keys_ptr, V, row_stride, PART: tl.constexpr, DEPENDENT: tl.constexpr):
    """One part's largest logit as an integer that compares as torch does: in its high half the logit, any NaN above
    +inf, in its low half the index, the first of equals largest."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, index = tl.program_id(1), tl.program_id(0) * PART + tl.arange(0, PART)
    logit = tl.load(logits_ptr + row.to(tl.int64) * row_stride + index, mask=index < V, other=float("-inf"))
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # of two negative floats the larger has the smaller bits
    bits = tl.where(logit != logit, NAN, bits)
    key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    key = tl.where(index < V, key, LOWEST)
    tl.store(keys_ptr + row * tl.num_programs(0) + tl.program_id(0), tl.max(key, 0))


@triton.jit
def largest_of_row(keys_ptr, ids_ptr, values_ptr, parts, P_TILE: tl.constexpr, DEPENDENT: tl.constexpr):
    """Of a row's parts, as id and logit."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, part = tl.program_id(0), tl.arange(0, P_TILE)
    key = tl.max(tl.load(keys_ptr + row * parts + part, mask=part < parts, other=LOWEST), 0)
    bits = (key >> 32).to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    tl.store(ids_ptr + row, 0x7FFFFFFF - (key & 0xFFFFFFFF))
    tl.store(values_ptr + row, bits.to(tl.float32, bitcast=True))
