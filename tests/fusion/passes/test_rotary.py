"""Rotary embedding as models spell it, whole and in part, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from paceline.fusion.rotary import HeadNorm, angles, rotate, rotate_heads

B, H, S, D = 3, 2, 5, 8


def half_turned(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + half_turned(x) * sin


def in_float32(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return turned(x.float(), cos, sin).to(x.dtype)


def in_part(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos[..., :4], sin[..., :4]
    return torch.cat((turned(x[..., :4], cos, sin), x[..., 4:]), -1)


def other_order(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return sin * torch.cat([x[:, :, :, half:].neg(), x[:, :, :, :half]], 3) + cos * x


def of_known_heads(spelling: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A model's heads have a size by its configuration, and its batches any."""

    def run(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return spelling(*(one.reshape(*one.shape[:-1], D) for one in (x, cos, sin)))

    return run


def inputs(cos_shape: tuple[int, ...] = (1, 1, S, D), dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=draw).to(dtype) for shape in ((B, H, S, D), cos_shape, cos_shape))


@pytest.mark.parametrize("shape", [(1, 1, S, D), (B, 1, S, D), (S, D), (1, S, D)])
@pytest.mark.parametrize("spelling", [turned, in_float32, in_part, other_order])
def test_spellings(
    rewritten: Callable[..., Any], spelling: Callable[..., torch.Tensor], shape: tuple[int, ...]
) -> None:
    """Cosines and sines of two halves that differ, too."""
    assert rewritten(of_known_heads(spelling), inputs(shape)).replaced["rotary embedding"] == 1


def test_conversions_go_with_it(rewritten: Callable[..., Any]) -> None:
    def between(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return in_float32(x * 1.5, cos, sin) * 1.5

    narrow, wide = (rewritten(of_known_heads(between), inputs(dtype=one)) for one in (torch.bfloat16, torch.float32))
    assert narrow.replaced["rotary embedding"] == 1
    assert narrow.nodes_after == wide.nodes_after


def first_half_negated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], -x[..., :half]), -1) * sin


def uneven(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.cat((-x[..., 3:], x[..., :3]), -1) * sin


def of_another(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + half_turned(x + 1) * sin


def by_heads(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return turned(x, cos.expand(1, H, S, D) * torch.arange(1, H + 1)[:, None, None], sin)


def apart(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The part that does not turn comes first."""
    return torch.cat((x[..., :4], turned(x[..., 4:], cos[..., :4], sin[..., :4])), -1)


def with_the_first_again(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.cat((turned(x[..., :4], cos[..., :4], sin[..., :4]), x[..., :4]), -1)


def subtracted(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos - half_turned(x) * sin


def wider(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return turned(x, cos.double(), sin.double())


@pytest.mark.parametrize("spelling", [first_half_negated, uneven, of_another, by_heads, subtracted, wider])
def test_what_stays(rewritten: Callable[..., Any], spelling: Callable[..., torch.Tensor]) -> None:
    assert not rewritten(of_known_heads(spelling), inputs()).replaced["rotary embedding"]


@pytest.mark.parametrize("spelling", [apart, with_the_first_again])
def test_what_is_no_beginning_of_a_head_turns_by_itself(
    rewritten: Callable[..., Any], spelling: Callable[..., torch.Tensor]
) -> None:
    assert rewritten(of_known_heads(spelling), inputs()).replaced["rotary embedding"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rotated", [4, D])
def test_errs_no_more_than_the_models_own(dtype: torch.dtype, rotated: int) -> None:
    x, cos, sin = (one.double() for one in inputs((B, 1, S, rotated), dtype))
    part = x[..., :rotated]
    exact = torch.cat((turned(part, cos, sin), x[..., rotated:]), -1)
    own = torch.cat((turned(part.to(dtype), cos.to(dtype), sin.to(dtype)), x[..., rotated:].to(dtype)), -1)
    found = rotate(x.to(dtype), angles(cos.to(dtype), sin.to(dtype), B))
    assert found.dtype == dtype
    assert (found.double() - exact).norm() <= (own.double() - exact).norm() + 1e-7


def test_heads_side_by_side_are_heads_apart() -> None:
    """Each normed by itself, then turned; padded and packed."""
    x, cos, sin = inputs()
    k = x[:, :1] + 1
    turns = angles(cos, sin, B)
    norm = HeadNorm(torch.arange(1.0, D + 1), torch.ones(D), 0.1)

    def wanted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * weight
        return turned(normed, cos, sin).transpose(1, 2).flatten(2)

    flat = [one.transpose(1, 2).flatten(2) for one in (x, k)]
    padded = rotate_heads(*flat, turns, (H, 1), norm)
    packed = rotate_heads(*(one.flatten(0, 1) for one in flat), turns.flatten(0, 1), (H, 1), norm)
    for found, rows, one, weight in zip(padded, packed, (x, k), norm[:2], strict=True):
        torch.testing.assert_close(found, wanted(one, weight), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rows, found.flatten(0, 1), rtol=0, atol=0)
