"""How a device's memory is divided: the weights, the largest step, and the cache with what is left.

The engine allocates by this, and the planner prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from paceline import sizing, sizing_cuda
from paceline.config import CacheConfig, DecoderConfig, KVGroup, SchedulerConfig
from paceline.engine.graphs import MOST_ROWS, graph_rows
from paceline.formats import keeps_memory, packing_bytes, resident_bytes, unpack_bytes

CPU_CACHE_SHARE = 0.25  # of the memory left after the weights; a host has other work than this cache
CUDA_MEMORY_SHARE = 0.9  # of the memory free before loading, for weights, cache and activations together


@dataclass(frozen=True)
class Sizes:
    """What a decoder takes on its device, part by part, beside the cache: the functions of sizing.py and
    sizing_cuda.py for one model as it is loaded and run.

    `graphs`: its decodes are captured. `workspace`: cuBLAS's. `read_bytes`: of a value that is read onto the device in
    the checkpoint's own dtype first. `held`: of a rank, whose `config` is of its part alone; None: the whole model.
    """

    config: DecoderConfig
    dtype: torch.dtype
    format: str
    device: torch.device
    scheduler: SchedulerConfig
    block_size: int
    graphs: bool = False
    workspace: int = 0
    read_bytes: int = 0
    held: sizing.Held | None = None

    @cached_property
    def weights(self) -> sizing.WeightBytes:
        return sizing.weight_bytes(
            self.config, self.dtype.itemsize, self._resident, tied_head_shares=self._kept, held=self.held
        )

    @property
    def loading(self) -> int:
        """Beside the weights while they are loaded; given back before there is a cache."""
        return sizing.loading_bytes(
            self.config,
            self.dtype.itemsize,
            self.read_bytes,
            packing=packing_bytes(self.format, self.dtype, self.device),
            packed=self._resident,
            kept=self._kept,
            held=self.held,
        )

    def step(self, context: int) -> int:
        """The largest step, for contexts of so many tokens."""
        scheduler = self.scheduler
        chunk = scheduler.max_chunk or scheduler.max_num_batched_tokens
        return self.step_of(
            sizing.StepShape(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, context, chunk, self.block_size)
        )

    def step_of(self, shape: sizing.StepShape) -> int:
        size = self.dtype.itemsize
        backend = sizing.cuda_backend(size) if self.device.type == "cuda" else sizing.PLAIN
        return sizing.activation_bytes(
            self.config, shape, size, unpacked=self._unpacked, backend=backend, held=self.held
        )

    @property
    def logprobs(self) -> int:
        """Log probabilities, while they are computed."""
        return sizing.logprob_workspace_bytes(self.config.vocab_size, self.scheduler.max_num_batched_tokens)

    def buffers(self, context: int) -> int:
        """Of captured steps."""
        if not self.graphs:
            return 0
        decodes = sizing_cuda.decode_buffer_bytes(len(self.config.kv_groups), self._rows, context, self.block_size)
        return decodes + sizing_cuda.prompt_buffer_bytes(
            self.config, self._rows, context, self.block_size, self.dtype.itemsize
        )

    @property
    def graph_pool(self) -> int:
        return sizing_cuda.graph_pool_bytes(self.graph_step(self._rows)) if self.graphs else 0

    @property
    def graph_reserve(self) -> int:
        """The part of it that one segment holds, taken before the first capture."""
        return sizing_cuda.reserved_bytes(self.graph_step(self._rows)) if self.graphs else 0

    def graph_step(self, rows: int) -> int:
        """What one captured step of so many decodes computes in."""
        return sizing_cuda.graph_step_bytes(
            self.config,
            rows,
            self.dtype.itemsize,
            unpacked=self._unpacked,
            workspace=self.workspace,
            held=self.held,
        )

    def beside(self, context: int) -> int:
        """All but weights and cache."""
        return self.step(context) + self.logprobs + self.buffers(context) + self.graph_pool + self.workspace

    @property
    def _rows(self) -> int:
        return graph_rows(min(self.scheduler.max_num_seqs, MOST_ROWS))

    @property
    def _resident(self) -> sizing.FormatBytes:
        return resident_bytes(self.format, self.dtype, self.device)

    @property
    def _kept(self) -> bool:
        rows = (self.held or sizing.whole(self.config)).head_rows
        return keeps_memory(self.format, (rows, self.config.hidden_size), self.dtype, self.device)

    @property
    def _unpacked(self) -> sizing.FormatBytes:
        return unpack_bytes(self.format, self.dtype)


@dataclass(frozen=True)
class Room:
    """Memory for steps and cache. `nbytes`: what is left beside the weights; `step_bytes(context)`: what the largest
    step takes of it, for contexts of so many tokens; `cache_share`: of the rest, what the cache may take, unless
    `cache_bytes` says its size."""

    nbytes: int
    step_bytes: Callable[[int], int]
    cache_share: float = 1.0
    cache_bytes: int | None = None

    def free(self, context: int) -> int:
        """Bytes left beside weights and steps."""
        return self.nbytes - self.step_bytes(context)

    def budget(self, context: int) -> int:
        """Bytes that the cache may take."""
        return self.cache_bytes if self.cache_bytes is not None else int(self.free(context) * self.cache_share)


def divide(
    groups: Sequence[KVGroup],
    room: Room,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    *,
    bytes_per_value: int,
    longest: int,
    shorten: bool,
) -> tuple[int, sizing.CachePlan]:
    """The context to run with, and the cache for it. `shorten`: contexts may become shorter than `longest`, so that
    one of them fits the cache; otherwise, or if even a block does not fit, the plan may not fit its budget."""

    def plan(context: int) -> sizing.CachePlan:
        return sizing.plan_cache(
            groups,
            block_size=cache.block_size,
            bytes_per_value=bytes_per_value,
            budget_bytes=room.budget(context),
            max_model_len=context,
            max_num_seqs=scheduler.max_num_seqs,
            step_tokens=scheduler.max_num_batched_tokens,
        )

    def fits(context: int) -> bool:
        found = plan(context)
        return found.num_tokens >= context and found.nbytes <= room.budget(context) <= room.free(context)

    if not shorten or fits(longest):
        return longest, plan(longest)
    low, high = 1, -(-longest // cache.block_size)  # in blocks: a longer context takes more of the room for its steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * cache.block_size) else (low, middle)
    context = min(low * cache.block_size, longest)
    return context, plan(context)
