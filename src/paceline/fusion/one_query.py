"""Attention of one query a head over many keys, as a step of generation asks for: what passes/gpu_attention.py puts
into graphs, in place of scaled_dot_product_attention.

torch's kernel gives each head one program, which reads its keys one tile after the other: 12 heads over 1,500 keys keep
12 of 132 multiprocessors busy. A product a head over all keys is spread over all of them.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from paceline.fusion.dynamo import safe_softmax

FEW_HEADS = 128  # of all rows: with more, torch's kernel fills a GPU
MANY_KEYS = 256  # with fewer, its one launch is as fast as three


def attend_one_query(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """[B, H, 1, D]: scaled_dot_product_attention of queries [B, H, 1, D] and keys and values [B, K, L, D]."""
    if query.shape[0] * query.shape[1] > FEW_HEADS or key.shape[2] < MANY_KEYS:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale, enable_gqa=enable_gqa)
    return by_products(query, key, value, attn_mask, scale=scale)


def by_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """The same by two products and a softmax in float32. Heads that share a head of keys are rows of one product."""
    batch, heads, _, dim = query.shape
    kv_heads, keys = key.shape[1:3]
    q_BKGD = query.reshape(batch, kv_heads, heads // kv_heads, dim) * (dim**-0.5 if scale is None else scale)
    scores_BKGL = (q_BKGD @ key.transpose(2, 3)).float()
    if attn_mask is not None:
        mask = attn_mask.expand(batch, attn_mask.shape[1], 1, keys)
        if mask.shape[1] != 1:
            mask = mask.reshape(batch, kv_heads, heads // kv_heads, keys)
        is_bool = mask.dtype == torch.bool
        scores_BKGL = scores_BKGL.masked_fill(~mask, float("-inf")) if is_bool else scores_BKGL + mask
    weights_BKGL = safe_softmax(scores_BKGL).to(value.dtype)
    return (weights_BKGL @ value).reshape(batch, heads, 1, value.shape[3])
