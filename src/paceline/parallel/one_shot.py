"""The sum of a small tensor over the GPUs of one host in a single kernel: each reads all the others' values through
NVLink and adds them itself.

A ring takes a latency a hop, and the sums of a decode of few rows are nothing but latency: 8 KiB a row of an 8B model.
torch's symmetric memory has the kernel (symm_mem::one_shot_all_reduce). NVLink's multicast is left alone
(TORCH_SYMM_MEM_DISABLE_MULTICAST, engine/ranks.py sets it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from paceline.log import get_logger

log = get_logger(__name__)

# Every rank reads (ranks - 1) * nbytes; a ring of n moves 2 / n of that over a link, in 2 * (n - 1) hops.
LIMIT_BYTES = 256 << 10
ALIGNMENT = 16  # bytes that one of the kernel's loads reads
DTYPES = (torch.bfloat16, torch.float32)  # that the kernel adds


def one_shot_refusal(x: torch.Tensor, limit: int = LIMIT_BYTES) -> str | None:
    """Why the kernel does not sum such a tensor; None where it does."""
    if x.device.type != "cuda":
        return f"device is {x.device.type}"
    return size_refusal(x.numel() * x.element_size(), x.dtype, limit)


def size_refusal(nbytes: int, dtype: torch.dtype, limit: int = LIMIT_BYTES) -> str | None:
    """The same for so many bytes, on CUDA."""
    if dtype not in DTYPES:
        return f"the kernel does not add {str(dtype).removeprefix('torch.')}"
    if nbytes > limit:
        return f"above {limit} bytes a ring is faster"
    if nbytes == 0 or nbytes % ALIGNMENT:
        return f"{nbytes} bytes are no multiple of {ALIGNMENT}"
    return None


def one_shot_ref(partials: Sequence[torch.Tensor]) -> torch.Tensor:
    """What every rank computes: the partial sums added in the order of the ranks, in float32, rounded once."""
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial.float()
    return total.to(partials[0].dtype)


@dataclass(frozen=True)
class OneShot:
    """`buffer`: memory that all ranks of the group see, `limit` bytes of it. Two sums of one stream never overlap: the
    kernel waits for every rank at its begin and at its end."""

    buffer: torch.Tensor  # uint8
    group_name: str
    limit: int = LIMIT_BYTES

    @staticmethod
    def open(group: dist.ProcessGroup, device: torch.device) -> OneShot | None:
        """Map each other's memory; None, and a line in the log, where the GPUs cannot."""
        if device.type != "cuda":
            return None
        import torch.distributed._symmetric_memory as symmetric  # CUDA's alone, and private: what it raises is caught

        try:
            buffer = symmetric.empty(LIMIT_BYTES, dtype=torch.uint8, device=device)
            symmetric.rendezvous(buffer, group.group_name)
        except (RuntimeError, ImportError, AttributeError) as error:
            log.warning("small sums over the GPUs go through NCCL: %s", str(error).partition("\n")[0])
            return None
        return OneShot(buffer, group.group_name)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the group, in new memory."""
        x = x.contiguous()
        shared = self.buffer[: x.numel() * x.element_size()].view(x.dtype)
        summed: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(shared, x.view(-1), "sum", self.group_name)
        return summed.view(x.shape)
