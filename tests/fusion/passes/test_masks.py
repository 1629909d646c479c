"""Masks that are looked up by places, as transformers does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

MASK = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]


def looked_up(kind: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def attend(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows, keys = torch.arange(mask.shape[0]), torch.arange(mask.shape[1])
        if kind == "shifted":
            rows = torch.arange(1, mask.shape[0] + 1) - 1
        if kind == "rolled":
            rows = torch.arange(-1, mask.shape[0] - 1)
        if kind == "zeros":
            keys = torch.zeros_like(keys)
        if kind == "of the first":
            rows = torch.arange(1)
        if kind == "turned":
            keys = keys.flip(0)
        seen = mask[rows[:, None, None, None], keys[None, None, None, :]]
        return F.scaled_dot_product_attention(x, x, x, attn_mask=seen)

    return attend


@pytest.mark.parametrize(
    ("kind", "count"), [("all", 1), ("shifted", 0), ("of the first", 0), ("turned", 0), ("rolled", 0), ("zeros", 0)]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_all_places_in_order_are_a_view(rewritten: Callable[..., Any], kind: str, count: int, batch: int) -> None:
    x = torch.randn(batch, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    graph = rewritten(looked_up(kind), (x, MASK[-batch:].clone()))
    if batch == 1 and kind in ("shifted", "rolled", "of the first"):
        count = 1  # the first is all there is
    assert graph.replaced["smaller mask"] == count
