"""What the ranks of one model tell each other: sums and gathers over the shards of a layer, hidden states from stage to
stage, and the numbers that all must agree on.

No call waits on the host for the device, so that a CUDA graph may hold all of them but `agree`. Every rank gets the
same bits from a sum and from a gather: they choose the same tokens, each for itself.

Shapes: T tokens, N columns of a shard, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from paceline.kernels.one_shot import Inboxes, one_shot, size_refusal
from paceline.parallel.one_shot import open_inboxes
from paceline.parallel.split import Rank


@dataclass(frozen=True)
class Communicator:
    """`world`: all ranks. `shards`: those of this rank's stage, in the order of `rank.tensor`. `stages`: those that
    hold this shard, one a stage. `inboxes`: through which the shards sum small tensors, where they can."""

    rank: Rank
    world: dist.ProcessGroup
    shards: dist.ProcessGroup
    stages: dist.ProcessGroup
    inboxes: Inboxes | None = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the shards; x may hold it or be left as it is."""
        x = x.contiguous()
        if self.inboxes is not None and size_refusal(x.numel() * x.element_size(), x.dtype) is None:
            return one_shot(x, self.inboxes)
        self.shards.allreduce([x]).wait()
        return x

    def gather_columns(self, x_TN: torch.Tensor) -> torch.Tensor:
        """The shards' columns side by side, [T, shards * N]."""
        count, (rows, columns) = self.rank.parallel.tensor, x_TN.shape
        gathered = x_TN.new_empty(count * rows, columns)
        self.shards._allgather_base(gathered, x_TN.contiguous()).wait()
        return gathered.view(count, rows, columns).movedim(0, 1).flatten(1)

    def send_on(self, x_TD: torch.Tensor) -> None:
        """To the next stage."""
        self.stages.send([x_TD.contiguous()], self.rank.stage + 1, 0).wait()

    def receive(self, x_TD: torch.Tensor) -> torch.Tensor:
        """From the stage before, into x."""
        self.stages.recv([x_TD], self.rank.stage - 1, 0).wait()
        return x_TD

    def from_last(self, x: torch.Tensor) -> torch.Tensor:
        """The last stage's x, on every stage."""
        x = x.contiguous()
        self.stages.broadcast(x, self.rank.parallel.pipeline - 1).wait()
        return x

    def agree(self, numbers: Sequence[int], device: torch.device) -> list[int]:
        """The least of each number over all ranks."""
        values = torch.tensor(numbers, dtype=torch.int64, device=device)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)
        self.world.allreduce([values], options).wait()
        return [int(value) for value in values.tolist()]


def connect(rank: Rank, store: Store, device: torch.device) -> Communicator:
    """Join the other ranks of this process's model, through `store`: NCCL on CUDA, gloo elsewhere. Waits for all of
    them. To be called once a process."""
    count = rank.parallel.world_size
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=rank.index, world_size=count)
    tensor, pipeline = rank.parallel.tensor, rank.parallel.pipeline
    by_stage = [[stage * tensor + shard for shard in range(tensor)] for stage in range(pipeline)]
    by_shard = [[stage * tensor + shard for stage in range(pipeline)] for shard in range(tensor)]
    # Every rank makes every group, in the same order, as torch asks.
    shards = [dist.new_group(ranks) for ranks in by_stage][rank.stage]
    stages = [dist.new_group(ranks) for ranks in by_shard][rank.tensor]
    world = dist.group.WORLD
    assert world is not None, "init_process_group has just made it"
    found = Communicator(rank, world, shards, stages)
    # NCCL takes its buffers at the first call: now, before memory is measured.
    inboxes = open_inboxes(shards, device) if tensor > 1 else None
    if found.agree([inboxes is not None], device)[0]:  # all shards sum through them, or none does
        found = replace(found, inboxes=inboxes)
    if tensor > 1:
        shards.allreduce([torch.zeros(1, device=device)]).wait()
    if not rank.is_first:
        found.receive(torch.zeros(1, device=device))
    if not rank.is_last:
        found.send_on(torch.zeros(1, device=device))
    if pipeline > 1:
        found.from_last(torch.zeros(1, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found
