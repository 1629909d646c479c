"""The memory through which the GPUs of one host add up small tensors (kernels/one_shot.py): torch's symmetric memory.

NVLink's multicast is left alone (TORCH_SYMM_MEM_DISABLE_MULTICAST, engine/ranks.py sets it).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from paceline.kernels.gpu import triton_refusal
from paceline.kernels.one_shot import LIMIT_BYTES, Inboxes, inbox_shape, num_programs
from paceline.log import get_logger

log = get_logger(__name__)


def open_inboxes(group: dist.ProcessGroup, device: torch.device) -> Inboxes | None:
    """Map each other's memory, where all ranks are on GPUs; None, and a line in the log, where they cannot. Waits for
    all of them."""
    if device.type != "cuda":
        return None
    refusal = triton_refusal(device, torch.float32)
    if refusal is None:
        import torch.distributed._symmetric_memory as symmetric  # CUDA's alone, and private: what it raises is caught

        rank, shape = group.rank(), inbox_shape(group.size())
        try:
            own_2RC = symmetric.empty(shape, dtype=torch.int64, device=device).zero_()
            torch.cuda.synchronize(device)  # before any other rank may write to it
            shared = symmetric.rendezvous(own_2RC, group.group_name)
            mapped = tuple(shared.get_buffer(peer, shape, torch.int64) for peer in range(group.size()))
        except (RuntimeError, ImportError, AttributeError) as error:
            refusal = str(error).partition("\n")[0]
        else:
            offset = own_2RC.data_ptr() - mapped[rank].data_ptr()  # in what was mapped, the same on all ranks
            peers_R = torch.tensor([one.data_ptr() + offset for one in mapped], dtype=torch.int64, device=device)
            sums = torch.zeros(num_programs(LIMIT_BYTES), dtype=torch.int32, device=device)
            return Inboxes(rank, own_2RC, peers_R, sums, mapped)
    log.warning("small sums over the GPUs go through NCCL: %s", refusal)
    return None
