"""Attention of few queries by the kernel: scaled_dot_product_attention's answers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from paceline.fusion import few_queries
from paceline.fusion.few_queries import attend_few_queries
from paceline.kernels.split_attention import MOST_ROWS

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them


def given(batch: int, heads: int, kv_heads: int, queries: int, keys: int, device: str) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(keys)
    shapes = (batch, heads, queries, 8), (batch, kv_heads, keys, 8), (batch, kv_heads, keys, 8)
    return tuple(torch.randn(shape, generator=draw).to(device) for shape in shapes)


MASKS = {
    "none": None,
    "keys": torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]).bool()[:, None, None],
    "one of all": torch.tensor([1, 1, 0, 1, 1]).bool()[None, None, None],
    "all hidden": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()[:, None, None],
    "added": torch.tensor([[0.5, -1.0, float("-inf"), 0.0, 2.0]] * 2)[:, None, None],
    "a head": torch.arange(40.0).view(2, 4, 1, 5) % 7 - 3,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_it_is_torchs(triton_device, mask, kv_heads, scale):
    q, k, v = given(2, 4, kv_heads, 2, 5, triton_device)
    mask = None if MASKS[mask] is None else MASKS[mask].to(triton_device)
    gqa = kv_heads != 4
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=gqa)
    torch.testing.assert_close(attend_few_queries(q, k, v, mask, scale=scale, enable_gqa=gqa), expected)


@pytest.mark.parametrize("queries", [MOST_ROWS, MOST_ROWS + 1])
def test_many_queries_are_torchs(triton_device, queries, monkeypatch):
    seen = []
    kernel = few_queries.kernel_attention
    monkeypatch.setattr(few_queries, "kernel_attention", lambda *args, **kw: seen.append(args) or kernel(*args, **kw))
    q, k, v = given(1, 2, 2, queries, 9, triton_device)
    torch.testing.assert_close(attend_few_queries(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert bool(seen) == (queries == MOST_ROWS)
