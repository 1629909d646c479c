"""Rows of a GGUF tensor in Hugging Face's order: bytes or values, for a row is moved whole.

Legend: R rows, B bytes (or elements) of one.
"""

from __future__ import annotations

import torch


def half_split(rows_RB: torch.Tensor, heads: int) -> torch.Tensor:
    """From interleaved to half-split rotary order: of a head, row 2j goes to j and row 2j + 1 to j + head_dim/2.

    Raises ValueError if the rows are no whole number of pairs a head.
    """
    if rows_RB.shape[0] % (2 * heads):
        raise ValueError(f"{rows_RB.shape[0]} rows, not a multiple of 2 x {heads} heads")
    pairs = rows_RB.view(heads, rows_RB.shape[0] // heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(rows_RB.shape)


def grouped(rows_RB: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """From all queries, all keys, all values to, for each key-value head, its queries, its key and its value.

    Raises ValueError if the rows are no whole number of heads.
    """
    if heads % kv_heads or rows_RB.shape[0] % (heads + 2 * kv_heads):
        raise ValueError(f"{rows_RB.shape[0]} rows, not those of {heads} heads and 2 x {kv_heads} key-value heads")
    head_dim = rows_RB.shape[0] // (heads + 2 * kv_heads)
    parts = torch.split(rows_RB, [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])
    return torch.cat([part.reshape(kv_heads, -1, rows_RB.shape[1]) for part in parts], 1).view(rows_RB.shape)
