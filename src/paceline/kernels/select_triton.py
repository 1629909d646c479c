"""The kernel of kernels/select.py, which has the legend and launches it. This module imports Triton: import it where
Triton is.
"""

# Triton kernels have no annotations: mypy checks what is around them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-0x7F800001)  # the key of -inf
HIGHEST = tl.constexpr(0x7F800000)  # and of inf


@triton.jit
def search(
    values_ptr,
    weights_ptr,
    targets_ptr,
    found_ptr,
    V,
    values_stride,
    weights_stride,
    most,
    TILE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The largest value of a row at and above which lies a count, or a sum of weights, of at least the target.

    Floats as integers that compare alike are bisected, so that a search ends, whatever the values, after 32 looks at
    the row. A target of `most` or more leaves nothing to search for.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    low = tl.full((), LOWEST, tl.int64)
    high = tl.full((), HIGHEST, tl.int64)
    high = tl.where(target >= most, low, high)
    while low < high:
        middle = low + (high - low + 1) // 2
        held = tl.zeros((TILE,), tl.float64)
        for start in range(0, V, TILE):
            index = start + tl.arange(0, TILE)
            value = tl.load(values_ptr + row * values_stride + index, mask=index < V, other=float("-inf"))
            bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
            key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # of two negative floats the larger has the smaller bits
            counted = (key >= middle) & (index < V)
            if WEIGHTED:
                weight = tl.load(weights_ptr + row * weights_stride + index, mask=counted, other=0.0)
                held += weight.to(tl.float64)
            else:
                held += counted.to(tl.float64)
        enough = tl.sum(held, 0) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    bits = low.to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    tl.store(found_ptr + row, bits.to(tl.float32, bitcast=True))
