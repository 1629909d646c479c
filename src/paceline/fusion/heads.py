"""Attention over [batch, tokens, heads * head_dim], as projections write it: what passes/heads.py and passes/padding.py
put into graphs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F


class Packing(NamedTuple):
    """Where the tokens of a padded batch are. `places`: [T] in [0, B S), None where nothing is padded."""

    places: torch.Tensor | None
    batch: int
    length: int


def packing(mask_BS: torch.Tensor, x_BSC: torch.Tensor) -> Packing:
    """Of a mask that is 0 at padding, for tensors of x's batch and length; with another form than theirs, which may be
    one mask for all rows, it leaves nothing out. Reads the mask's values: on a GPU the host waits for them."""
    batch, length = x_BSC.shape[:2]
    real = mask_BS.bool()
    nothing_padded = mask_BS.shape != (batch, length) or bool(real.all())
    return Packing(None if nothing_padded else real.flatten().nonzero().squeeze(1), batch, length)


def pack(x_BSC: torch.Tensor, packed: Packing) -> torch.Tensor:
    """[T, C]: the tokens alone."""
    x_NC = x_BSC.flatten(0, 1)
    return x_NC if packed.places is None else x_NC.index_select(0, packed.places)


def unpack(x_TC: torch.Tensor, packed: Packing) -> torch.Tensor:
    """[B, S, C] of the tokens, with zeros at padding."""
    if packed.places is None:
        return x_TC.view(packed.batch, packed.length, -1)
    x_NC = x_TC.new_zeros(packed.batch * packed.length, x_TC.shape[1])
    return x_NC.index_copy_(0, packed.places, x_TC).view(packed.batch, packed.length, -1)


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
    """[B, S, C]: scaled_dot_product_attention of the heads of q, k and v. `mask`: its attn_mask. Head h of q goes with
    head h // (heads / kv_heads) of k and v."""
    q, k, v = (
        x.unflatten(-1, (count, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
        for x, count in ((q_BSC, heads), (k_BKC, kv_heads), (v_BKC, kv_heads))
    )
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
    packed: Packing,
) -> torch.Tensor:
    """[T, C]: the tokens' rows of attend() of the padded batch, whose `mask` this is."""
    q, k, v = (unpack(x, packed) for x in (q_TC, k_TC, v_TC))
    return pack(attend(q, k, v, mask, heads, kv_heads, scale, causal), packed)
