"""Padding left out: the tokens of padded sequences one after the other, and back. Nothing but `count_places` waits for
the device, so a CUDA graph may hold all the rest.

Legend: B sequences of S places, of which a mask says which hold tokens; T: a bound of their number, chosen by the host;
C channels.

Each function has its plain twin in torch, ..._ref; the kernels are in kernels/padding_triton.py, for CUDA where
kernels/gpu.py: triton_refusal finds nothing against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.kernels.gpu import as_bytes, gpu, launch_options

PLACES = 4096  # a step of the plan
BLOCK = 1024  # channels a program of the rest


@dataclass(frozen=True)
class Packing:
    """Where tokens lie. `starts_B`, int32 [B + 1]: of each sequence among the packed, and their end. `place_T`, int32
    [T]: of each packed token among the B * S places, -1 after the last. `index_BS`, int32 [B, S]: of each place among
    the packed tokens, -1 for padding."""

    starts_B: torch.Tensor
    place_T: torch.Tensor
    index_BS: torch.Tensor


def count_places(mask_BS: torch.Tensor) -> int:
    """How many places the mask, booleans or integers, does not mask with a 0; what launched before is waited for.

    One kernel writes it into the host's memory: count_nonzero is four and a copy, 60 us on an H100's host.
    """
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    from paceline.kernels.padding_triton import count_kernel

    count = torch.empty(1, dtype=torch.int32, pin_memory=mask_BS.is_cuda)
    count_kernel[(1,)](
        as_bytes(mask_BS),
        count,
        *mask_BS.stride(),
        mask_BS.shape[1],
        mask_BS.numel(),
        BLOCK=PLACES,
        num_warps=8,
    )
    if mask_BS.is_cuda:
        torch.cuda.current_stream(mask_BS.device).synchronize()
    return int(count)


def count_places_ref(mask_BS: torch.Tensor) -> int:
    return int(mask_BS.count_nonzero())


def plan_packing(mask_BS: torch.Tensor, bound: int) -> Packing:
    """What `pack` and `unpack` follow: the tokens are where the mask, booleans or integers, is not 0, in their order.

    `bound` is T. Tokens from it on are dropped, so whoever chooses it must know that there are no more.
    """
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    from paceline.kernels.padding_triton import plan_kernel

    B, S = mask_BS.shape
    packing = Packing(
        *(torch.empty(shape, dtype=torch.int32, device=mask_BS.device) for shape in ((B + 1,), (bound,), (B, S)))
    )
    dependent = gpu(mask_BS.device).dependent
    # A program a sequence, and one for what follows the last.
    plan_kernel[(B + 1,)](
        as_bytes(mask_BS),
        packing.starts_B,
        packing.place_T,
        packing.index_BS,
        *mask_BS.stride(),
        B,
        S,
        bound,
        BLOCK=PLACES,
        DEPENDENT=dependent,
        num_warps=8,
        **launch_options(dependent),
    )
    return packing


def plan_packing_ref(mask_BS: torch.Tensor, bound: int) -> Packing:
    """The same, through the host."""
    flat = (mask_BS != 0).flatten()
    starts_B = torch.zeros(mask_BS.shape[0] + 1, dtype=torch.int32, device=mask_BS.device)
    starts_B[1:] = (mask_BS != 0).sum(1).cumsum(0).clamp(max=bound)
    places = flat.nonzero()[:bound, 0].int()
    place_T = torch.full((bound,), -1, dtype=torch.int32, device=mask_BS.device)
    place_T[: places.shape[0]] = places
    index = (flat.int().cumsum(0) - 1).masked_fill_(~flat, -1).int()
    return Packing(starts_B, place_T, index.masked_fill_(index >= bound, -1).view(mask_BS.shape))


def pack(x_BSC: torch.Tensor, packing: Packing) -> torch.Tensor:
    """The tokens' rows of x, [T, C], contiguous; zeros after the last. Channels are contiguous in x."""
    return _gather(x_BSC, packing.place_T)


def pack_ref(x_BSC: torch.Tensor, packing: Packing) -> torch.Tensor:
    return _gather_ref(x_BSC.flatten(0, 1), packing.place_T)


def unpack(x_TC: torch.Tensor, packing: Packing) -> torch.Tensor:
    """[B, S, C], contiguous: the packed rows where they came from, zeros in the padding."""
    return _gather(x_TC[None], packing.index_BS)


def unpack_ref(x_TC: torch.Tensor, packing: Packing) -> torch.Tensor:
    return _gather_ref(x_TC, packing.index_BS)


def _gather_ref(x_RC: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    found = x_RC.new_zeros((*rows.shape, x_RC.shape[1]))
    found[rows >= 0] = x_RC[rows[rows >= 0].long()]
    return found


def _gather(x_BSC: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of x, counted through its first two dimensions; zeros where the number is negative."""
    from paceline.kernels.padding_triton import gather_kernel

    C = x_BSC.shape[2]
    y = x_BSC.new_empty((*rows.shape, C))
    if y.numel() == 0:
        return y
    dependent = gpu(x_BSC.device).dependent
    gather_kernel[(rows.numel(), -(-C // BLOCK))](
        x_BSC,
        rows,
        y,
        x_BSC.shape[1],
        x_BSC.stride(0),
        x_BSC.stride(1),
        C,
        BLOCK=BLOCK,
        DEPENDENT=dependent,
        num_warps=4,
        **launch_options(dependent),
    )
    return y
