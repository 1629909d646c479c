"""The cache's tensors. Which block belongs to whom is the manager's business (cache/manager.py), on the host."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

from paceline.config import KVGroup
from paceline.inputs import KVLayer


def allocate_kv(
    groups: Sequence[KVGroup],
    num_blocks: Sequence[int],
    block_size: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> list[KVLayer]:
    """A KVLayer a decoder layer. `num_blocks[g]` blocks for each layer of group g, and the null block before them.

    Zeroed, so that a masked read of a slot never written adds no NaN.
    """
    layers: dict[int, KVLayer] = {}
    for index, (group, count) in enumerate(zip(groups, num_blocks, strict=True)):
        shape = (2, group.num_kv_heads, (count + 1) * block_size, group.head_dim)
        for layer in group.layers:
            k_HSD, v_HSD = _zeros(shape, dtype, torch.device(device))
            layers[layer] = KVLayer(k_HSD, v_HSD, index)
    return [layers[layer] for layer in sorted(layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on CPU as an anonymous map, whose pages take memory only once they are written. torch.zeros writes them
    all, and huge pages would map 2 MiB for the first token of every layer's every head (360 MB for SmolLM2)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    region = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        region.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(region, dtype=dtype).view(shape)


def copy_block(layers: Sequence[KVLayer], group: int, source: int, target: int, block_size: int) -> None:
    """Copy a block's keys and values in every layer of a group."""
    src = slice(source * block_size, (source + 1) * block_size)
    dst = slice(target * block_size, (target + 1) * block_size)
    for layer in layers:
        if layer.group == group:
            layer.k_HSD[:, dst] = layer.k_HSD[:, src]
            layer.v_HSD[:, dst] = layer.v_HSD[:, src]
