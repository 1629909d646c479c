"""The kernel of kernels/rope_qk.py, which has the legend and launches it. This module imports Triton: import it where
Triton is.
"""

# Triton kernels have no annotations: mypy checks what is around them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from paceline.kernels.rope_kv_triton import load_turned


# Compiled once for all batches, not for each way in which their sizes happen to be multiples of 16.
@triton.jit(do_not_specialize=["tokens", "length", "q_batch_stride", "k_batch_stride", "angle_batch_stride"])
def rope_qk_kernel(
    q_ptr,  # [B, S, H, D]
    k_ptr,  # [B, S, K, D]
    cos_ptr,  # [B, S, F]
    sin_ptr,
    q_weight_ptr,  # [D]; None: no norm
    k_weight_ptr,
    q_out_ptr,  # like q, contiguous
    k_out_ptr,
    tokens,  # of all sequences
    length,  # S
    eps,
    q_batch_stride,
    q_stride,
    q_head_stride,
    k_batch_stride,
    k_stride,
    k_head_stride,
    angle_batch_stride,
    angle_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    F: tl.constexpr,
    CENTRED: tl.constexpr,
    N: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One head of N tokens: a query's (below H) or a key's."""
    head = tl.program_id(0)
    token = tl.program_id(1) * N + tl.arange(0, N)[None, :]
    dims, live = tl.arange(0, D_TILE)[:, None], token < tokens
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sequence, place = (token // length).to(tl.int64), (token % length).to(tl.int64)
    angles_at = sequence * angle_batch_stride + place * angle_stride
    if head < H:
        x_ptrs = q_ptr + sequence * q_batch_stride + place * q_stride + head * q_head_stride
        x = load_turned(x_ptrs, q_weight_ptr, cos_ptr, sin_ptr, angles_at, live, eps, D, D_TILE, F, CENTRED)
        out_ptrs = q_out_ptr + (token.to(tl.int64) * H + head) * D + dims
        tl.store(out_ptrs, x.to(q_out_ptr.dtype.element_ty), mask=live & (dims < D))
    else:
        x_ptrs = k_ptr + sequence * k_batch_stride + place * k_stride + (head - H) * k_head_stride
        x = load_turned(x_ptrs, k_weight_ptr, cos_ptr, sin_ptr, angles_at, live, eps, D, D_TILE, F, CENTRED)
        out_ptrs = k_out_ptr + (token.to(tl.int64) * K + head - H) * D + dims
        tl.store(out_ptrs, x.to(k_out_ptr.dtype.element_ty), mask=live & (dims < D))
