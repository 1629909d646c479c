"""Attention over [batch, tokens, heads * head_dim], as projections write it: what passes/heads.py, passes/padding.py
and passes/gpu_attention.py put into graphs.

`mask` is scaled_dot_product_attention's attn_mask, of the padded batch: booleans, or what is added to the scores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from paceline.fusion.packing import Packed, pack, unpack
from paceline.kernels.flash_attention import ALL, Keys, flash_attention, packed_attention
from paceline.kernels.split_attention import rows_refusal, split_attention, splitting_pays


class Heads(NamedTuple):
    """How many heads queries have, and keys and values: head h of the queries goes with head h // (queries / keys) of
    these. `scale`: of the scores; None is 1 / sqrt(head_dim). `causal`: a query sees no key behind its place. `window`:
    it sees those at most so far from it, on both sides, which torch's own attention does not know."""

    queries: int
    keys: int
    scale: float | None
    causal: bool
    window: int | None = None


def attend(
    q_BSC: torch.Tensor,
    k_BKC: torch.Tensor,
    v_BKC: torch.Tensor,
    mask: torch.Tensor | None,
    heads: Heads,
) -> torch.Tensor:
    """[B, S, C]: attention of the heads of q, k and v, by torch."""
    q, k, v = (x.transpose(1, 2) for x in _apart(q_BSC, k_BKC, v_BKC, heads))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=heads.causal, scale=heads.scale, enable_gqa=heads.queries != heads.keys
    )
    return y.transpose(1, 2).flatten(2)


def attend_packed(
    q_TC: torch.Tensor,
    k_TC: torch.Tensor,
    v_TC: torch.Tensor,
    mask: torch.Tensor | None,
    heads: Heads,
    packed: Packed,
) -> torch.Tensor:
    """[T, C]: the tokens' rows of attend() of the padded batch."""
    q, k, v = (unpack(x, packed) for x in (q_TC, k_TC, v_TC))
    return pack(attend(q, k, v, without_padding(mask, packed), heads), packed)


def attend_by_kernel(
    q_BSC: torch.Tensor,
    k_BKC: torch.Tensor,
    v_BKC: torch.Tensor,
    mask: torch.Tensor | None,
    heads: Heads,
) -> torch.Tensor:
    """attend() by a kernel that reads q, k and v where they lie."""
    q, k, v = _apart(q_BSC, k_BKC, v_BKC, heads)
    return kernel_attention(q, k, v, mask, _scale(q, heads), _keys(heads)).flatten(2)


def kernel_attention(
    q_BSHD: torch.Tensor,
    k_BLKD: torch.Tensor,
    v_BLKD: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    keys: Keys = ALL,
) -> torch.Tensor:
    """[B, S, H, D]: by kernels/split_attention.py for few queries where that pays, else kernels/flash_attention.py."""
    mask_BL, bias = (mask[:, 0, 0], None) if mask is not None and _is_of_keys(mask) else (None, mask)
    if keys == ALL and rows_refusal(q_BSHD, k_BLKD) is None and splitting_pays(q_BSHD, k_BLKD):
        return split_attention(q_BSHD, k_BLKD, v_BLKD, scale=scale, mask_BL=mask_BL, bias_BHSL=bias)
    return flash_attention(q_BSHD, k_BLKD, v_BLKD, scale=scale, keys=keys, mask_BL=mask_BL, bias_BHSL=bias)


def attend_packed_by_kernel(
    q_TC: torch.Tensor,
    k_TC: torch.Tensor,
    v_TC: torch.Tensor,
    mask: torch.Tensor | None,
    heads: Heads,
    packed: Packed,
) -> torch.Tensor:
    """attend_packed() by the kernel. A mask of keys alone is the padding's, and packed sequences have none: whether it
    is, is tried when a graph is captured."""
    mask = without_padding(mask, packed)
    if packed.plan is None or not (mask is None or _is_of_keys(mask)):
        q, k, v = (unpack(x, packed) for x in (q_TC, k_TC, v_TC))
        return pack(attend_by_kernel(q, k, v, mask, heads), packed)
    q, k, v = _apart(q_TC, k_TC, v_TC, heads)
    return packed_attention(
        q,
        k,
        v,
        packed.plan.starts_B,
        scale=_scale(q, heads),
        keys=_keys(heads),
        place_T=packed.plan.place_T,
    ).flatten(1)


def _apart(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: Heads) -> list[torch.Tensor]:
    """[..., C] as [..., heads, head_dim]."""
    counts = heads.queries, heads.keys, heads.keys
    return [x.view(*x.shape[:-1], count, -1) for x, count in zip((q, k, v), counts, strict=True)]


def _keys(heads: Heads) -> Keys:
    return Keys(causal=heads.causal, window=heads.window)


def _scale(q: torch.Tensor, heads: Heads) -> float:
    return float(q.shape[-1] ** -0.5) if heads.scale is None else heads.scale


def without_padding(mask: torch.Tensor | None, packed: Packed) -> torch.Tensor | None:
    """None for the mask of padding where there is none."""
    return None if mask is None or (packed.full and _is_of_keys(mask)) else mask


def _is_of_keys(mask: torch.Tensor) -> bool:
    """Whether it says which keys count, the same for all heads and queries."""
    return mask.dtype == torch.bool and mask.shape[1:3] == (1, 1)
