"""What may stand between the splitting of heads and attention, in which order, and what keeps heads apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

B, H, S, D = 3, 4, 5, 8
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def unbound(x: torch.Tensor) -> Parts:
    return tuple(one.transpose(1, 2) for one in x.view(*x.shape[:2], 3, H, D).unbind(2))  # type: ignore[return-value]


def unbound_behind_a_transpose(x: torch.Tensor) -> Parts:
    return x.view(*x.shape[:2], 3, H, D).transpose(3, 1).unbind(dim=2)  # type: ignore[return-value]


def unbound_in_front(x: torch.Tensor) -> Parts:
    return x.reshape(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[return-value]


def looked_up(x: torch.Tensor) -> Parts:
    parts = x.reshape(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4)
    return parts[0], parts[1], parts[-1]


def other_pieces(x: torch.Tensor) -> Parts:
    """Values first."""
    v, q, k = unbound(x)
    return q, k, v


def by_heads(x: torch.Tensor) -> Parts:
    """Each head's queries, keys and values side by side."""
    return tuple(one.transpose(1, 2) for one in x.view(*x.shape[:2], H, 3, D).unbind(3))  # type: ignore[return-value]


def tokens_last(x: torch.Tensor) -> Parts:
    """What is one token's is taken for one head's."""
    return x.view(*x.shape[:2], 3, H, D).permute(2, 0, 1, 3, 4).unbind(0)  # type: ignore[return-value]


def joined(y: torch.Tensor) -> torch.Tensor:
    return y.transpose(1, 2).flatten(2)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("batch", [B, 1])
@pytest.mark.parametrize(
    ("split", "count"),
    [
        (unbound, 1),
        (unbound_behind_a_transpose, 1),
        (unbound_in_front, 1),
        (looked_up, 1),
        (other_pieces, 1),
        (by_heads, 0),
    ],
)
def test_pieces_of_one_product(
    rewritten: Callable[..., Any], split: Callable[..., Parts], count: int, batch: int
) -> None:
    graph = rewritten(lambda x: joined(F.scaled_dot_product_attention(*split(x))), (draw(batch, S, 3 * H * D),))
    assert graph.replaced["heads taken along"] == count


def test_tokens_are_not_heads(rewritten: Callable[..., Any]) -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        return joined(F.scaled_dot_product_attention(*tokens_last(x)))

    assert not rewritten(attend, (draw(B, S, 3 * H * D),)).replaced["heads taken along"]


def copies(x: torch.Tensor, queries_each: int) -> torch.Tensor:
    """As transformers has it: each head, and its copies behind it."""
    batch, heads, length, size = x.shape
    apart = x[:, :, None, :, :].expand(batch, heads, queries_each, length, size)
    return apart.reshape(batch, heads * queries_each, length, size)


def copies_of_all(x: torch.Tensor, queries_each: int) -> torch.Tensor:
    """All heads, and then all again."""
    batch, heads, length, size = x.shape
    return x[:, None].expand(batch, queries_each, heads, length, size).reshape(batch, -1, length, size)


@pytest.mark.parametrize(("copied", "values", "count"), [(copies, 2, 1), (copies, 1, 0), (copies_of_all, 2, 0)])
def test_heads_that_share_keys(
    rewritten: Callable[..., Any], copied: Callable[[torch.Tensor, int], torch.Tensor], values: int, count: int
) -> None:
    """`values`: how many queries' heads share one's."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = q.view(*q.shape[:2], H, D).transpose(1, 2)
        k, v = (copied(x.view(*x.shape[:2], H // each, D).transpose(1, 2), each) for x, each in ((k, 2), (v, values)))
        return joined(F.scaled_dot_product_attention(q, k, v))

    graph = rewritten(attend, (draw(B, S, H * D), draw(B, S, 2 * D), draw(B, S, H // values * D) + 1))
    assert graph.replaced["heads taken along"] == count


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


@pytest.mark.parametrize(
    ("steps", "count"),
    [
        ("- - -", 1),
        ("t t -", 1),
        ("nt nt -", 1),
        ("t - -", 0),
        ("- t -", 0),
        ("t t t", 0),
        ("t o -", 0),
        ("nt t -", 0),
        ("nt mt -", 0),
        ("n n -", 0),
        ("tn tn -", 0),
    ],
)
@pytest.mark.parametrize("early", [True, False])
def test_queries_and_keys_go_the_same_way(rewritten: Callable[..., Any], steps: str, count: int, early: bool) -> None:
    """Of queries, keys and values: t turned, o by other angles, n normed, m with another eps. A norm may be `early`,
    before tokens and heads are exchanged."""

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **weights: torch.Tensor
    ) -> torch.Tensor:
        cos, sin = cos.view(1, 1, -1, D), sin.view(1, 1, -1, D)
        step = {
            "-": lambda x: x,
            "t": lambda x: turned(x, cos, sin),
            "o": lambda x: turned(x, sin, cos),
            "n": lambda x: F.rms_norm(x, (D,), weights["weight"], 1e-3),
            "m": lambda x: F.rms_norm(x, (D,), weights["weight"], 0.1),
        }
        parts = []
        for x, names in zip((q, k, v), steps.split(), strict=True):
            x = x.view(*x.shape[:2], H, D)
            before = early and names[0] in "nm"
            x = (step[names[0]](x) if before else x).transpose(1, 2)
            for name in names[before:]:
                x = step[name](x)
            parts.append(x)
        return joined(F.scaled_dot_product_attention(*parts))

    flat = [draw(B, S, H * D) + shift for shift in range(3)]
    graph = rewritten(attend, (*flat, draw(1, 1, S, D), draw(1, 1, S, D) + 1), weight=draw(D))
    assert graph.replaced["heads taken along"] == count


@pytest.mark.parametrize("first", ["q", "k"])
def test_turned_queries_and_keys_that_others_use(rewritten: Callable[..., Any], first: str) -> None:
    """A cache, and what is computed of the first before the second turns."""

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        cos, sin = cos.view(1, 1, -1, D), sin.view(1, 1, -1, D)
        heads = {name: x.view(*x.shape[:2], H, D).transpose(1, 2) for name, x in zip("qkv", (q, k, v), strict=True)}
        heads[first] = turned(heads[first], cos, sin)
        early = heads[first].exp()
        other = "k" if first == "q" else "q"
        heads[other] = turned(heads[other], cos, sin)
        y = F.scaled_dot_product_attention(heads["q"], heads["k"], heads["v"])
        return joined(y), early, heads["q"], heads["k"] + 1

    flat = [draw(B, S, H * D) + shift for shift in range(3)]
    graph = rewritten(attend, (*flat, draw(1, 1, S, D), draw(1, 1, S, D) + 1))
    assert graph.replaced["heads taken along"] == 1
    assert graph.replaced["rotary embedding"] == 2
