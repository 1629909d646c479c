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
    mean, factor = 0.0, 1.0
    if weight_ptr is not None:
        mean, factor = _norm_factors(x_ptrs, 0, mask, eps, 1, D, D_TILE, CENTRED)
    return _turn(x_ptrs, weight_ptr, mean, factor, cos_ptr, sin_ptr, angles_at, mask, D, D_TILE, F)


@triton.jit
def _turn(x_ptrs, weight_ptr, mean, factor, cos_ptr, sin_ptr, angles_at, mask,
          D: tl.constexpr, D_TILE: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """load_turned, of heads whose mean and factor are known."""
    dims = tl.arange(0, D_TILE)[:, None]
    # The element that each turns with: i + F/2 in the first half, i - F/2 in the second; runs that load at once.
    RUN: tl.constexpr = (F // 2) & -(F // 2) if F > 0 else 1
    partner = tl.where(dims < F // 2, dims + F // 2, dims - F // 2)
    partner = tl.multiple_of(tl.max_contiguous(partner, [RUN, 1]), [RUN, 1])
    turns = mask & (dims < F)
    x = tl.load(x_ptrs + dims, mask=mask & (dims < D), other=0.0).to(tl.float32)
    other = tl.load(x_ptrs + partner, mask=turns, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        x = (x - mean) * factor * tl.load(weight_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)
        other = (other - mean) * factor * tl.load(weight_ptr + partner, mask=dims < F, other=0.0).to(tl.float32)
    if F > 0:
        cos = tl.load(cos_ptr + angles_at + dims, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + angles_at + dims, mask=turns, other=0.0).to(tl.float32)
        x = x * cos + other * sin
    return x


@triton.jit
def _norm_factors(x_ptrs, head_stride, mask, eps, HEADS: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr,
                  CENTRED: tl.constexpr):  # fmt: skip
    """Mean (0 unless CENTRED) and 1 / sqrt(variance + eps) over HEADS heads from `x_ptrs` on: [1, N]."""
    dims = tl.arange(0, D_TILE)[:, None]
    inside = mask & (dims < D)
    x = tl.load(x_ptrs + dims, mask=inside, other=0.0).to(tl.float32)
    mean = tl.zeros([1, x.shape[1]], tl.float32)
    if CENTRED:
        sums = tl.sum(x, 0)
        for head in tl.range(1, HEADS):
            sums += tl.sum(tl.load(x_ptrs + head * head_stride + dims, mask=inside, other=0.0).to(tl.float32), 0)
        mean = sums[None, :] / (HEADS * D)
    centred = tl.where(dims < D, x - mean, 0.0)
    squares = tl.sum(centred * centred, 0)
    for head in tl.range(1, HEADS):
        x = tl.load(x_ptrs + head * head_stride + dims, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(dims < D, x - mean, 0.0)
        squares += tl.sum(centred * centred, 0)
    return mean, 1.0 / tl.sqrt(squares[None, :] / (HEADS * D) + eps)


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
    tokens,
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
    N: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One head of N tokens: a query's (below H), a key's (below H + K) or a value's."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0)
    token = (tl.program_id(1) * N + tl.arange(0, N))[None, :].to(tl.int64)
    dims, live = tl.arange(0, D_TILE)[:, None], token < tokens
    mask = live & (dims < D)
    x_ptrs = qkv_ptr + token * token_stride + head * head_stride
    if head >= H + K:
        values = tl.load(x_ptrs + dims, mask=mask, other=0.0)
        slot = tl.load(slots_ptr + token, mask=live, other=-1)
        cache = v_cache_ptr + (head - H - K).to(tl.int64) * v_head_stride
        tl.store(cache + slot * D + dims, values, mask=mask & (slot >= 0))
        return
    weight_ptr = q_weight_ptr
    mean, factor = tl.zeros([1, N], tl.float32), tl.full([1, N], 1.0, tl.float32)
    if q_weight_ptr is not None:
        if head >= H:
            weight_ptr = k_weight_ptr
        if not TOGETHER:
            mean, factor = _norm_factors(x_ptrs, 0, live, eps, 1, D, D_TILE, CENTRED)
        elif head < H:
            weight_ptr += head * D
            mean, factor = _norm_factors(qkv_ptr + token * token_stride, head_stride, live, eps, H, D, D_TILE, CENTRED)
        else:
            weight_ptr += (head - H) * D
            keys_ptrs = qkv_ptr + token * token_stride + H * head_stride
            mean, factor = _norm_factors(keys_ptrs, head_stride, live, eps, K, D, D_TILE, CENTRED)
    x = _turn(x_ptrs, weight_ptr, mean, factor, cos_ptr, sin_ptr, token * F, live, D, D_TILE, F)
    if head < H:
        tl.store(q_ptr + (token * H + head) * D + dims, x.to(q_ptr.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slots_ptr + token, mask=live, other=-1)
        cache = k_cache_ptr + (head - H).to(tl.int64) * k_head_stride
        tl.store(cache + slot * D + dims, x.to(k_cache_ptr.dtype.element_ty), mask=mask & (slot >= 0))
