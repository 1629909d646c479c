"""Attention over [batch, tokens, heads * head_dim], as projections write it: what passes/heads.py, passes/padding.py
and passes/gpu_attention.py put into graphs.

`mask` is scaled_dot_product_attention's attn_mask, of the padded batch: booleans, or what is added to the scores. Head
h of the queries goes with head h // (heads / kv_heads) of keys and values.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from paceline.fusion.packing import Packed, pack, unpack
from paceline.kernels.flash_attention import Keys, flash_attention, packed_attention


def attend(
    q_BSC: torch.Tensor,
    k_BKC: torch.Tensor,
    v_BKC: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float | None,
    causal: bool,
) -> torch.Tensor:
    """[B, S, C]: attention of the heads of q, k and v, by torch."""
    q, k, v = (_apart(x, count).transpose(1, 2) for x, count in ((q_BSC, heads), (k_BKC, kv_heads), (v_BKC, kv_heads)))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=heads != kv_heads
    )
    return y.transpose(1, 2).flatten(2)


def attend_packed(
    q_TC: torch.Tensor,
    k_TC: torch.Tensor,
    v_TC: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float | None,
    causal: bool,
    packed: Packed,
) -> torch.Tensor:
    """[T, C]: the tokens' rows of attend() of the padded batch."""
    q, k, v = (unpack(x, packed) for x in (q_TC, k_TC, v_TC))
    return pack(attend(q, k, v, mask, heads, kv_heads, scale, causal), packed)


def attend_by_kernel(
    q_BSC: torch.Tensor,
    k_BKC: torch.Tensor,
    v_BKC: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float | None,
    causal: bool,
) -> torch.Tensor:
    """attend() by kernels/flash_attention.py, which reads q, k and v where they lie."""
    q, k, v = (_apart(x, count) for x, count in ((q_BSC, heads), (k_BKC, kv_heads), (v_BKC, kv_heads)))
    y_BSHD = flash_attention(
        q,
        k,
        v,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        keys=Keys(causal=causal),
        mask_BL=mask[:, 0, 0] if mask is not None and _is_of_keys(mask) else None,
        bias_BHSL=None if mask is None or _is_of_keys(mask) else mask,
    )
    return y_BSHD.flatten(2)


def attend_packed_by_kernel(
    q_TC: torch.Tensor,
    k_TC: torch.Tensor,
    v_TC: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float | None,
    causal: bool,
    packed: Packed,
) -> torch.Tensor:
    """attend_packed() by the kernel. A mask of keys alone is the padding's, and packed sequences have none: whether it
    is, is tried when a graph is captured."""
    if packed.plan is None or causal or not (mask is None or _is_of_keys(mask)):
        q, k, v = (unpack(x, packed) for x in (q_TC, k_TC, v_TC))
        return pack(attend_by_kernel(q, k, v, mask, heads, kv_heads, scale, causal), packed)
    q, k, v = (_apart(x, count) for x, count in ((q_TC, heads), (k_TC, kv_heads), (v_TC, kv_heads)))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return packed_attention(q, k, v, packed.plan.starts_B, scale=scale).flatten(1)


def _apart(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.view(*x.shape[:-1], heads, -1)


def _is_of_keys(mask: torch.Tensor) -> bool:
    """Whether it says which keys count, the same for all heads and queries."""
    return mask.dtype == torch.bool and mask.shape[1:3] == (1, 1)
