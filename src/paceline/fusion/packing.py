"""Padding left out: the tokens of a padded batch one after the other, and back. On a GPU by kernels/padding.py, which
never waits for the device; elsewhere by torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.kernels import gpu, padding

STEP = 128  # on a GPU, token counts are rounded up to this, so that a few graphs serve all


@dataclass(frozen=True)
class Packed:
    """Where the tokens of a batch are. `places`: [T] in [0, batch * length); `plan`: the same for kernels, whose T is a
    bound. Neither: nothing is left out; `full`: nothing is padding."""

    batch: int
    length: int
    places: torch.Tensor | None = None
    plan: padding.Packing | None = None
    full: bool = False


def count_tokens(mask_BS: torch.Tensor) -> int:
    """How many rows packed tensors have: all only where nothing is padding. The host waits for the mask."""
    runs = gpu.triton_refusal(mask_BS.device, mask_BS.dtype) is None
    tokens, all_rows = (padding.count_places if runs else padding.count_places_ref)(mask_BS), mask_BS.numel()
    if mask_BS.device.type != "cuda" or tokens == all_rows:
        return tokens
    return min(-(-tokens // STEP) * STEP, all_rows - 1)


def packing(mask_BS: torch.Tensor, x_BSC: torch.Tensor, rows: int) -> Packed:
    """Of a mask that is 0 at padding, for tensors of x's batch and length; with another form than theirs, which may be
    one mask for all, it leaves nothing out. `rows`: count_tokens of it."""
    batch, length = x_BSC.shape[:2]
    if mask_BS.shape != (batch, length):
        return Packed(batch, length)
    if rows == batch * length:
        return Packed(batch, length, full=True)
    if gpu.triton_refusal(x_BSC.device, x_BSC.dtype) is None:
        return Packed(batch, length, plan=padding.plan_packing(mask_BS, rows))
    return Packed(batch, length, mask_BS.bool().flatten().nonzero().squeeze(1))


def pack(x_BSC: torch.Tensor, packed: Packed) -> torch.Tensor:
    """[T, C]: the tokens alone."""
    if packed.plan is not None:
        return padding.pack(x_BSC, packed.plan)
    x_NC = x_BSC.flatten(0, 1)
    return x_NC if packed.places is None else x_NC.index_select(0, packed.places)


def unpack(x_TC: torch.Tensor, packed: Packed) -> torch.Tensor:
    """[B, S, C] of the tokens, with zeros at padding."""
    if packed.plan is not None:
        return padding.unpack(x_TC, packed.plan)
    if packed.places is None:
        return x_TC.view(packed.batch, packed.length, -1)
    x_NC = x_TC.new_zeros(packed.batch * packed.length, x_TC.shape[1])
    return x_NC.index_copy_(0, packed.places, x_TC).view(packed.batch, packed.length, -1)
