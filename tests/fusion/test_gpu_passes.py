"""What the passes for a GPU put into graphs: its kernels run in Triton's interpreter where there is none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import paceline
from paceline.fusion import packing, passes, report
from paceline.fusion.heads import Heads, attend, attend_packed, attend_packed_by_kernel
from paceline.fusion.packing import Packed
from paceline.fusion.passes import cpu_attention
from paceline.kernels import cuda_linear, gpu

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them
WIDTH, HEADS = 32, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2) for part in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())
        return self.out(y.transpose(1, 2).reshape(x.shape))


class After(nn.Module):
    """Norms after each block, as BERT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.first(x + self.attention(x, attention_mask))
        return self.second(x + self.down(F.gelu(self.up(x))))


class Before(nn.Module):
    """Norms before each block, and a gated one."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.gate, self.up, self.down = (
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )
        self.first, self.second, self.last = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.attention(self.first(x), attention_mask)
        normed = self.second(x)
        x = x + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return self.last(x), x


@pytest.fixture
def device(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where kernels run, which passes take for a GPU."""
    if triton_device == "cpu":
        monkeypatch.setattr(gpu, "triton_refusal", lambda device, dtype: None)
        monkeypatch.setattr(cuda_linear, "SMALL_ROWS", 64)
        monkeypatch.setattr(passes, "STAGES", tuple(one for one in passes.STAGES if one is not cpu_attention.apply))
    return triton_device


def inputs(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """On a GPU of so many tokens that padding is left out, whose rows there come in multiples of packing.STEP."""
    generator = torch.Generator().manual_seed(0)
    length = 5 if device == "cpu" else packing.STEP
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, 2:] = mask[2, 4:] = 0
    return torch.randn(3, length, WIDTH, generator=generator).to(device), mask.to(device)


@pytest.mark.parametrize("level", ["safe", "fast"])
@pytest.mark.parametrize("kind", [After, Before])
def test_kernels_take_along_what_follows(device: str, kind: type[nn.Module], level: str) -> None:
    torch.manual_seed(0)
    model = kind().eval().to(device)
    x, mask = inputs(device)
    with torch.no_grad():
        wanted = model(x, attention_mask=mask)
    paceline.optimize(model, level=level)
    model(x, attention_mask=mask)
    found = model(x, attention_mask=mask)
    (graph,) = report(model).graphs
    assert graph.refused is None, graph.refused
    real = mask.bool()
    for one, other in zip([found] if kind is After else found, [wanted] if kind is After else wanted, strict=True):
        if level == "fast":
            assert not one[~real].any()
        torch.testing.assert_close(one[real], other[real], rtol=1e-3, atol=1e-3)
    assert graph.replaced["attention by kernel"] == 1
    assert graph.replaced["linear by kernel"] == 1  # queries, keys and values
    assert graph.replaced["padding left out"] == (level == "fast")
    assert graph.replaced["linear with residual and norm"] == 2
    assert graph.replaced["linear with gelu" if kind is After else "linear with silu and its gate"] == 1


# With attention spelled as torch has it: how many masks are distances and a mask of keys. Every other layer of this
# ModernBERT is a local one.
DISTANCES = {"modernbert": 1, "qwen3": 2}


@pytest.mark.parametrize("name", DISTANCES)
def test_rotary_embedding_windows_and_causal_masks(
    device: str, tiny_model: Callable[..., nn.Module], tiny_inputs: Callable[..., Any], name: str
) -> None:
    """Without padding at the left and inside, and where there is none."""
    pytest.importorskip("transformers")
    model = tiny_model(name).to(device)
    model.config.use_cache = False  # keys and values at padding would be results
    own = copy.deepcopy(model)
    paceline.optimize(model, level="fast")
    length = 10 if device == "cpu" else packing.STEP
    given = {key: value.to(device) for key, value in tiny_inputs(name, 2, length, "left").items()}
    given["attention_mask"][0, 2:8] = 0
    for _ in range(2):
        with torch.no_grad():
            model(**given)
            found, wanted = model(**given)[0], own(**given)[0]
        real = given["attention_mask"].bool()
        torch.testing.assert_close(found[real], wanted[real], rtol=1e-3, atol=1e-3)
        assert not found[~real].any()
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
    (graph,) = report(model).graphs
    assert graph.refused is None, graph.refused
    assert graph.replaced["rotary embedding by kernel"] == 2
    assert graph.replaced["attention by kernel"] == 2
    assert graph.replaced["mask of distances"] == DISTANCES[name]
    assert graph.replaced["padding left out"] == 1


def test_turned_queries_whose_heads_stay_apart(
    device: str, tiny_model: Callable[..., nn.Module], tiny_inputs: Callable[..., Any]
) -> None:
    pytest.importorskip("transformers")
    model = tiny_model("gpt-neox").to(device)
    own = copy.deepcopy(model)
    paceline.optimize(model)
    given = {key: value.to(device) for key, value in tiny_inputs("gpt-neox", 2, 7).items()}
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(**given)[0], own(**given)[0], rtol=1e-3, atol=1e-3)
    (graph,) = report(model).graphs
    assert graph.refused is None, graph.refused
    assert graph.replaced["rotary embedding by kernel"] == 4


def test_one_token_of_padding_is_left_out_and_no_padding_leaves_the_mask_out(device: str) -> None:
    torch.manual_seed(0)
    model = After().eval().to(device)
    x, _ = inputs(device)
    masks = [torch.ones(x.shape[:2], dtype=torch.long, device=device) for _ in range(2)]
    masks[1][2, -1] = 0
    with torch.no_grad():
        wanted = [model(x, attention_mask=mask) for mask in masks]
    paceline.optimize(model, level="fast")
    for _ in range(2):
        for mask, one in zip(masks, wanted, strict=True):
            found = model(x, attention_mask=mask)
            torch.testing.assert_close(found[mask.bool()], one[mask.bool()], rtol=1e-3, atol=1e-3)
    assert not found[2, -1].any()
    assert report(model).graphs[0].replaced["padding left out"] == 1


class Step(nn.Module):
    """A step of generation: few queries, over keys and values that lie in a cache."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5) + 1


@pytest.mark.parametrize("queries", [1, 4, 9])
def test_few_queries_are_answered_by_the_kernel_that_splits_keys(device: str, queries: int) -> None:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, queries, 8, generator=draw).to(device)
    k, v = (torch.randn(2, 3, 300, 8, generator=draw).to(device) for _ in "kv")
    shown = (torch.arange(300) < torch.tensor([[7], [290]]))[:, None, None].to(device)
    mask = torch.zeros(shown.shape, device=device).masked_fill(~shown, float("-inf"))
    model = Step().eval()
    wanted = model(q, k, v, mask)
    paceline.optimize(model)
    for _ in range(2):
        torch.testing.assert_close(model(q, k, v, mask), wanted, rtol=1e-4, atol=1e-5)
    (graph,) = report(model).graphs
    assert graph.replaced["attention of few queries by kernel"] == (queries < 9)


class ByChannels(nn.Module):
    """What comes out of a convolution is laid out by channels, and is the residual of the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block = nn.Conv1d(3, WIDTH, 3, padding=1), Before()

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.block(self.conv(x).permute(0, 2, 1), attention_mask)[0]


def test_a_residual_laid_out_by_channels(device: str) -> None:
    torch.manual_seed(0)
    model = ByChannels().eval().to(device)
    x, mask = torch.randn(1, 3, 6).to(device), torch.ones(1, 6, dtype=torch.long).to(device)
    with torch.no_grad():
        wanted = model(x, attention_mask=mask)
    paceline.optimize(model)
    for _ in range(2):
        torch.testing.assert_close(model(x, attention_mask=mask), wanted, rtol=1e-3, atol=1e-3)
    (graph,) = report(model).graphs
    assert graph.refused is None, graph.refused
    assert graph.replaced["linear with residual and norm"] == 2


@pytest.mark.parametrize("attention", [attend_packed, attend_packed_by_kernel])
def test_where_nothing_is_padding_the_mask_is_not_read(device: str, attention: Any) -> None:
    q, k, v = torch.randn(3, 2, 5, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]], dtype=torch.bool, device=device)[:, None, None]
    heads = Heads(HEADS, HEADS, None, False)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    found = attention(*flat, mask, heads, Packed(2, 5, full=True)).view(q.shape)
    torch.testing.assert_close(found, attend(q, k, v, None, heads), rtol=1e-4, atol=1e-4)
    found = attention(*flat, mask, heads, Packed(2, 5)).view(q.shape)
    torch.testing.assert_close(found, attend(q, k, v, mask, heads), rtol=1e-4, atol=1e-4)
    bias = torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(1)).to(device)  # no mask of padding
    found = attention(*flat, bias, heads, Packed(2, 5, full=True)).view(q.shape)
    torch.testing.assert_close(found, attend(q, k, v, bias, heads), rtol=1e-4, atol=1e-4)
