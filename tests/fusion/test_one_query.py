"""Attention of one query a head by products: scaled_dot_product_attention's answers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from paceline.fusion import one_query
from paceline.fusion.one_query import attend_one_query, by_products


def given(batch: int, heads: int, kv_heads: int, keys: int, dim: int = 8) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(keys)
    shapes = (batch, heads, 1, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim)
    return tuple(torch.randn(shape, generator=draw) for shape in shapes)


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
def test_products_give_what_torch_gives(mask, kv_heads, scale):
    q, k, v = given(2, 4, kv_heads, 5)
    expected = F.scaled_dot_product_attention(q, k, v, MASKS[mask], scale=scale, enable_gqa=kv_heads != 4)
    torch.testing.assert_close(by_products(q, k, v, MASKS[mask], scale=scale), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_are_those_of_the_dtype(dtype):
    """With a bias as large as T5's, which rounds the scores away where it is added in 16 bits."""
    exact = given(2, 4, 2, 300, 16)
    q, k, v, bias = (x.to(dtype) for x in (*exact, torch.full((1, 1, 1, 300), 100.0)))
    expected = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v, bias)), enable_gqa=True)
    torch_error = (F.scaled_dot_product_attention(q, k, v, enable_gqa=True).double() - expected).norm()
    found = by_products(q, k, v, bias)
    assert found.dtype == dtype
    assert (found.double() - expected).norm() <= 2 * torch_error


def test_strided_keys_are_read_where_they_are():
    q, k, v = given(2, 4, 4, 6)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    torch.testing.assert_close(by_products(q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize(
    ("batch", "heads", "keys", "products"), [(1, 12, 1500, True), (16, 12, 1500, False), (1, 12, 100, False)]
)
def test_torchs_kernel_runs_where_it_fills_a_gpu(batch, heads, keys, products, monkeypatch):
    seen = []
    monkeypatch.setattr(one_query, "by_products", lambda q, k, v, mask, scale: seen.append(q) or by_products(q, k, v))
    q, k, v = given(batch, heads, heads, keys, 2)
    torch.testing.assert_close(attend_one_query(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert bool(seen) == products
