"""The kernel of kernels/embed.py, which has the legend and launches it. This module imports Triton: import it where
Triton is.
"""

# Triton kernels have no annotations: mypy checks what is around them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def embed_kernel(
    ids_ptr,
    positions_ptr,
    table_ptr,
    frequencies_ptr,  # None: no angles
    x_ptr,
    cos_ptr,
    sin_ptr,
    scale,
    length,
    row_stride,
    BLOCKS: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
    F_TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One of BLOCKS blocks of a token's row; after them, its cosines and sines."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if block < BLOCKS:
        columns = block * BLOCK + tl.arange(0, BLOCK)
        row_ptr = table_ptr + tl.load(ids_ptr + token) * row_stride
        x = tl.load(row_ptr + columns, mask=columns < M, other=0.0)
        x = (x.to(tl.float32) * scale).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + token * M + columns, x, mask=columns < M)
    # Two conditions: the first is the compiler's, and leaves nothing to compile where there are no angles.
    if frequencies_ptr is not None:  # noqa: SIM102
        if block == BLOCKS:
            element = tl.arange(0, F_TILE)
            frequency = tl.load(frequencies_ptr + element, mask=element < F, other=0.0)
            angle = tl.load(positions_ptr + token).to(tl.float32) * frequency
            at = token * F + element
            tl.store(cos_ptr + at, (tl.cos(angle) * length).to(cos_ptr.dtype.element_ty), mask=element < F)
            tl.store(sin_ptr + at, (tl.sin(angle) * length).to(sin_ptr.dtype.element_ty), mask=element < F)
