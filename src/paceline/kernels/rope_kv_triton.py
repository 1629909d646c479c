"""The kernel of kernels/rope_kv.py, which has the legend and launches it, and what kernels/decode_attention_triton.py
shares with it. This module imports Triton: import it where Triton is.
"""

# Triton kernels have no annotations: mypy checks what is around them.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_turned(x_ptrs, weight_ptr, cos_ptr, sin_ptr, angles_at, mask, eps,
                D: tl.constexpr, D_TILE: tl.constexpr, F: tl.constexpr, CENTRED: tl.constexpr):  # fmt: skip
    """Heads behind `x_ptrs`, [1, N] or one pointer, each normed by itself unless `weight_ptr` is None, and turned by
    the angles that begin at `angles_at`: float32 [D_TILE, N]. Where `mask` is False: 0, and nothing is read."""
    dims = tl.arange(0, D_TILE)[:, None]
    # The element that each turns with: i + F/2 in the first half, i - F/2 in the second; runs that load at once.
    RUN: tl.constexpr = (F // 2) & -(F // 2) if F > 0 else 1
    partner = tl.where(dims < F // 2, dims + F // 2, dims - F // 2)
    partner = tl.multiple_of(tl.max_contiguous(partner, [RUN, 1]), [RUN, 1])
    inside, turns = mask & (dims < D), mask & (dims < F)
    x = tl.load(x_ptrs + dims, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_ptrs + partner, mask=turns, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        mean = tl.zeros([1, x.shape[1]], tl.float32)
        if CENTRED:
            mean = tl.sum(x, 0)[None, :] / D
        centred = tl.where(dims < D, x - mean, 0.0)
        factor = 1.0 / tl.sqrt(tl.sum(centred * centred, 0)[None, :] / D + eps)
        x = centred * factor * tl.load(weight_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)
        other = (other - mean) * factor * tl.load(weight_ptr + partner, mask=dims < F, other=0.0).to(tl.float32)
    if F > 0:
        cos = tl.load(cos_ptr + angles_at + dims, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + angles_at + dims, mask=turns, other=0.0).to(tl.float32)
        x = x * cos + other * sin
    return x


@triton.jit
def _norm_factors(token_ptr, head_stride, first_head, eps, HEADS: tl.constexpr, TILE: tl.constexpr,
                  D: tl.constexpr, D_TILE: tl.constexpr, CENTRED: tl.constexpr):  # fmt: skip
    """Mean (0 unless CENTRED) and 1 / sqrt(variance + eps) over HEADS heads of one token."""
    head, dims = tl.arange(0, TILE), tl.arange(0, D_TILE)
    inside = (head < HEADS)[:, None] & (dims < D)[None, :]
    x = tl.load(token_ptr + (first_head + head)[:, None] * head_stride + dims[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    mean = 0.0
    if CENTRED:
        mean = tl.sum(tl.sum(x, 1), 0) / (HEADS * D)
    x = tl.where(inside, x - mean, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(tl.sum(x * x, 1), 0) / (HEADS * D) + eps)


@triton.jit
def rope_and_write(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    slots_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    eps,
    token_stride,
    head_stride,
    k_head_stride,
    v_head_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    F: tl.constexpr,
    CENTRED: tl.constexpr,
    TOGETHER: tl.constexpr,
    H_TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One head of one token: a query's (below H), a key's (below H + K) or a value's."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token_ptr = qkv_ptr + token * token_stride
    dims = tl.arange(0, D_TILE)
    # The element that each turns with: i + F/2 in the first half, i - F/2 in the second.
    partner = tl.where(dims < F // 2, dims + F // 2, dims - F // 2)
    turns = dims < F
    x_ptr = token_ptr + head * head_stride
    x = tl.load(x_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)
    if head < H + K:
        other = tl.load(x_ptr + partner, mask=turns, other=0.0).to(tl.float32)
        if q_weight_ptr is not None:
            first_head = head
            weight_ptr = q_weight_ptr
            if head >= H:
                weight_ptr = k_weight_ptr
            if TOGETHER:
                first_head = tl.where(head < H, 0, H)
                weight_ptr += (head - first_head) * D
                if head < H:
                    mean, factor = _norm_factors(token_ptr, head_stride, 0, eps, H, H_TILE, D, D_TILE, CENTRED)
                else:
                    mean, factor = _norm_factors(token_ptr, head_stride, H, eps, K, H_TILE, D, D_TILE, CENTRED)
            else:
                mean, factor = _norm_factors(token_ptr, head_stride, head, eps, 1, 1, D, D_TILE, CENTRED)
            x = (x - mean) * factor * tl.load(weight_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)
            other = (other - mean) * factor * tl.load(weight_ptr + partner, mask=turns, other=0.0).to(tl.float32)
        if F > 0:
            cos = tl.load(cos_ptr + token * F + dims, mask=turns, other=1.0).to(tl.float32)
            sin = tl.load(sin_ptr + token * F + dims, mask=turns, other=0.0).to(tl.float32)
            x = x * cos + other * sin
    if head < H:
        tl.store(q_ptr + (token * H + head) * D + dims, x.to(q_ptr.dtype.element_ty), mask=dims < D)
    else:
        slot = tl.load(slots_ptr + token)
        if head < H + K:
            cache = k_cache_ptr + (head - H).to(tl.int64) * k_head_stride
        else:
            cache = v_cache_ptr + (head - H - K).to(tl.int64) * v_head_stride
        if slot >= 0:
            tl.store(cache + slot * D + dims, x.to(k_cache_ptr.dtype.element_ty), mask=dims < D)
