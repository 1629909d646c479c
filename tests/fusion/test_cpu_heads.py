"""Attention over one product's thirds on a CPU, as torch's own and as products, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import paceline
from paceline.fusion import cpu_heads, report
from paceline.fusion.cpu_heads import attend_joined, attend_joined_packed
from paceline.fusion.heads import Heads
from paceline.fusion.packing import count_tokens, pack, packing

H, D = 4, 32


def exact(qkv_BSX: torch.Tensor, mask: torch.Tensor | None, heads: Heads) -> torch.Tensor:
    batch, length, _ = qkv_BSX.shape
    q, k, v = (x.view(batch, length, H, D).transpose(1, 2).double() for x in qkv_BSX.chunk(3, -1))
    bias = None if mask is None else mask.double()
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=heads.causal, scale=heads.scale)
    return y.transpose(1, 2).flatten(2)


def inputs(batch: int, length: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(batch, length, 3 * H * D, generator=torch.Generator().manual_seed(length)).to(dtype)


def mask_of(*lengths: int) -> torch.Tensor:
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.zeros((), dtype=torch.bfloat16).where(real[:, None, None], float("-inf"))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Products wherever they may be; how many texts each was for."""
    found: list[int] = []
    run = torch.bmm

    def counted(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found.append(len(v) // H)
        return run(scores, v)

    monkeypatch.setattr(cpu_heads, "products_pay", lambda: True)
    monkeypatch.setattr(cpu_heads, "FEWEST_SCORES", 1)
    monkeypatch.setattr(torch, "bmm", counted)
    return found


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found.double() - wanted).norm() < 8e-3 * wanted.norm())


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("lengths", "some"), [((7,), 100), ((9, 4, 9, 1, 2), 100), ((9, 4, 9, 1, 2), 2 * H * 81)])
def test_products(
    products: list[int], monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], some: int, scale: float | None
) -> None:
    monkeypatch.setattr(cpu_heads, "SOME_SCORES", some)
    qkv, heads = inputs(len(lengths), max(lengths)), Heads(H, H, scale, False)
    for mask in (None, mask_of(*lengths)):
        products.clear()
        assert close(attend_joined(qkv, mask, heads), exact(qkv, mask, heads))
        assert products == ([1] * len(lengths) if some == 100 else [2, 2, 1])


@pytest.mark.parametrize("what", ["causal", "float32", "mask of queries", "long", "a text without keys"])
def test_the_rest_is_torchs_own(products: list[int], monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    qkv, mask, heads = inputs(2, 6), mask_of(6, 3), Heads(H, H, None, what == "causal")
    if what == "causal":
        mask = None  # type: ignore[assignment]
    if what == "float32":
        qkv, mask = qkv.float(), mask.float()
    if what == "mask of queries":
        mask = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    if what == "long":
        monkeypatch.setattr(cpu_heads, "MOST_SCORES", H * 36 - 1)
    if what == "a text without keys":
        mask = mask_of(6, 0)
    found = attend_joined(qkv, mask, heads)
    assert not products
    assert close(found, exact(qkv, mask, heads).nan_to_num())


class SelfAttention(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.parts = nn.ModuleDict({name: nn.Linear(H * D, H * D) for name in "qkv"})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = {name: self.parts[name](x).unflatten(-1, (H, D)).transpose(1, 2) for name in self.order}
        y = F.scaled_dot_product_attention(made["q"], made["k"], made["v"])
        return y.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(("order", "count"), [("qkv", 1), ("vqk", 0), ("qvk", 0)])
def test_what_is_queries_keys_and_values_stays_it(order: str, count: int) -> None:
    torch.manual_seed(0)
    model = paceline.optimize(SelfAttention(order).eval())
    x = torch.randn(2, 6, H * D, generator=torch.Generator().manual_seed(0))
    for given in (x, x + 1):
        torch.testing.assert_close(model(given), SelfAttention.forward(model, given), rtol=1e-5, atol=1e-5)
    graph = report(model).graphs[0]
    assert graph.refused is None
    assert graph.replaced["heads taken along"] == 1
    assert graph.replaced["thirds of one product"] == count


def test_packed_tokens_get_what_padded_ones_do(products: list[int]) -> None:
    lengths = (5, 2, 4)
    qkv, heads = inputs(3, 5), Heads(H, H, None, False)
    mask_BS = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    packed = packing(mask_BS, qkv, count_tokens(mask_BS))
    found = attend_joined_packed(pack(qkv, packed), mask_of(*lengths), heads, packed)
    assert products
    assert close(found, pack(exact(qkv, mask_of(*lengths), heads), packed))
