"""The sum of a small tensor over the GPUs of one host in a single kernel: each puts its values into all the others'
memory through NVLink and adds what it gets.

A ring takes a latency a hop, and the sums of a decode of few rows are nothing but latency: 8 KiB a row of an 8B model.
Here a value travels with the number of the sum that it belongs to, as one packet of 8 bytes that arrives whole (the
protocol that NCCL calls LL): whoever reads the right number has the value, and nobody waits for a barrier. Sums use the
two halves of an inbox in turn. A rank that puts packets of sum n + 2 into a half has got this one's of sum n + 1, which
were sent once sum n was done there: nothing that is still to be read is overwritten.

Shapes: R ranks, C words of 32 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paceline.kernels.gpu import gpu, launch_options

# Packets double what travels: a ring moves 2 / R of a tensor over a link, this kernel (R - 1) * 2.
LIMIT_BYTES = 256 << 10
WORD_BYTES = 4
BLOCK = 512  # words a program: four programs for 8 KiB
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Inboxes:
    """Memory of the ranks that they map of each other. `own_2RC`: int64, zero before the first sum; `peers_R`: int64,
    the addresses of all ranks' `own_2RC` as this one sees them; `sums`: int32, zero at first, one a program; `mapped`:
    what `peers_R` points into, as long as it is needed."""

    rank: int
    own_2RC: torch.Tensor
    peers_R: torch.Tensor
    sums: torch.Tensor
    mapped: tuple[torch.Tensor, ...] = ()


def inbox_shape(ranks: int) -> tuple[int, int, int]:
    """Of `own_2RC`, for tensors of LIMIT_BYTES."""
    return 2, ranks, LIMIT_BYTES // WORD_BYTES


def num_programs(nbytes: int) -> int:
    return -(-nbytes // (WORD_BYTES * BLOCK))


def size_refusal(nbytes: int, dtype: torch.dtype) -> str | None:
    """Why the kernel does not sum a tensor of so many bytes; None where it does."""
    if dtype not in DTYPES:
        return f"the kernel does not add {str(dtype).removeprefix('torch.')}"
    if nbytes > LIMIT_BYTES:
        return f"it is for {LIMIT_BYTES >> 10} KiB and fewer"
    if nbytes == 0 or nbytes % WORD_BYTES:
        return f"{nbytes} bytes are not whole words"
    return None


def one_shot_ref(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """What every rank computes: the parts added in the order of the ranks, in float32, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def one_shot(x: torch.Tensor, inboxes: Inboxes) -> torch.Tensor:
    """The sum over the ranks of x, contiguous, of which `size_refusal` says None, in new memory; the same bits on all.
    Waits on the device for every rank's: all must call it, for the same sizes in the same order, on one stream each."""
    from paceline.kernels.one_shot_triton import one_shot_kernel

    device, y = gpu(x.device), torch.empty_like(x)
    _, ranks, capacity = inboxes.own_2RC.shape
    nbytes = x.numel() * x.element_size()
    one_shot_kernel[(num_programs(nbytes),)](
        x,
        y,
        inboxes.own_2RC,
        inboxes.peers_R,
        inboxes.sums,
        nbytes // WORD_BYTES,
        capacity,
        RANK=inboxes.rank,
        RANKS=ranks,
        PEERS=1 << (ranks - 1).bit_length(),
        BLOCK=BLOCK,
        ASM=device.ptx,
        DEPENDENT=device.dependent,
        num_warps=4,
        **launch_options(device.dependent),
    )
    return y
