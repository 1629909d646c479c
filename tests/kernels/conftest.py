"""Random paged batches for the kernel tests."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from paceline.inputs import AttentionMetadata, KVLayer
from paceline.kernels.attention_plan import build_attention


@dataclass(frozen=True)
class Batch:
    q_THD: torch.Tensor
    kv: KVLayer
    metadata: AttentionMetadata


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """make_batch([(context, queries), ...]): each request's last `queries` of `context` tokens are this step's."""

    def make(
        requests: list[tuple[int, int]],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 8,
        block_size: int = 4,
        window: int | None = None,
        consecutive: bool = False,
        padded: bool = True,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        poison: bool = True,
        seed: int = 0,
    ) -> Batch:
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        need = [-(-context // block_size) for context, _ in requests]
        ids = list(range(1, sum(need) + 4))
        if not consecutive:
            rng.shuffle(ids)
        tables, taken = [], 0
        for count in need:
            tables.append(ids[taken : taken + count])
            taken += count
        slots = (max(ids) + 1) * block_size
        cache = torch.randn(2, kv_heads, slots, dim, generator=generator)
        if poison:  # slots that no request owns must not be read, not even times zero
            owned = {
                table[p // block_size] * block_size + p % block_size
                for table, (context, _) in zip(tables, requests, strict=True)
                for p in range(context)
            }
            unowned = [slot for slot in range(slots) if slot not in owned]
            cache[:, :, unowned] = float("nan") if not padded else 1e4
        starts = [0]
        for _, queries in requests:
            starts.append(starts[-1] + queries)
        cache = cache.to(device=device, dtype=dtype)
        metadata = build_attention(
            starts, [c for c, _ in requests], [tables], [window], block_size=block_size, device=device, padded=padded
        )
        q = torch.randn(starts[-1], heads, dim, generator=generator).to(device=device, dtype=dtype)
        return Batch(q, KVLayer(cache[0], cache[1], 0), metadata)

    return make
