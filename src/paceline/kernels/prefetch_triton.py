# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Asking for memory ahead of its use, for kernels that start before what they wait for is there."""

from __future__ import annotations

import triton
import triton.language as tl

LINE_BYTES = tl.constexpr(128)  # what one prefetch brings into the L2


@triton.jit
def prefetch_l2(pointers):
    """Asks for the lines behind a block of pointers and does not wait."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )
