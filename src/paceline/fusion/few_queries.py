"""Attention of few queries over many keys, as a step of generation asks for: what passes/gpu_attention.py puts into
graphs, in place of scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from paceline.fusion.heads import kernel_attention
from paceline.kernels.flash_attention import flash_shape_refusal
from paceline.kernels.split_attention import rows_refusal


def attend_few_queries(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """[B, H, S, D]: scaled_dot_product_attention of queries [B, H, S, D] and keys and values [B, K, L, D]; by torch
    where the queries turn out to be many."""
    q_BSHD, k_BLKD, v_BLKD = (x.transpose(1, 2) for x in (query, key, value))
    if flash_shape_refusal(q_BSHD, k_BLKD, v_BLKD) or rows_refusal(q_BSHD, k_BLKD):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale, enable_gqa=enable_gqa)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return kernel_attention(q_BSHD, k_BLKD, v_BLKD, attn_mask, scale).transpose(1, 2)
