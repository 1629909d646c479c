"""How a device's memory is divided: the weights, the largest step, and the cache with what is left.

The engine allocates by this, and the planner prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paceline import sizing
from paceline.config import CacheConfig, KVGroup, SchedulerConfig

CPU_CACHE_SHARE = 0.25  # of the memory left after the weights; a host has other work than this cache
CUDA_MEMORY_SHARE = 0.9  # of the memory free before loading, for weights, cache and activations together


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
