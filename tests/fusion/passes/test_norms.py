"""Each spelling of the root-mean-square norm that the pass claims, and what looks like one and is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

X = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.linspace(0.5, 1.5, 32)
EPS = 1e-5


def llama(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    given = x.dtype
    x = x.to(torch.float32)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * x.to(given)


SPELLINGS = {
    "llama": llama,
    "a product for the square": lambda x, weight: x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + EPS) * weight,
    "torch.square": lambda x, weight: weight * (x * (torch.square(x).mean(-1, keepdim=True) + EPS).rsqrt()),
    "divided by the root": lambda x, weight: weight * (x / torch.sqrt(x.pow(2).mean([-1], keepdim=True) + EPS)),
    "eps first": lambda x, weight: weight * (x * torch.rsqrt(EPS + torch.mean(x**2, -1, keepdim=True))),
}
NONE = {
    "over another dimension": lambda x, weight: weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS)),
    "of another tensor": lambda x, weight: weight * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + EPS)),
    "a cube": lambda x, weight: weight * (x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + EPS)),
    "less its mean": lambda x, weight: (
        weight * ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))
    ),
    "a sum": lambda x, weight: weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, rewritten: Callable[..., Any]) -> None:
    assert rewritten(SPELLINGS[name], (X,), (X * 1e-3,), weight=WEIGHT).replaced["rms norm"] == 1


@pytest.mark.parametrize("name", NONE)
def test_what_is_none(name: str, rewritten: Callable[..., Any]) -> None:
    assert not rewritten(NONE[name], (X,), weight=WEIGHT).replaced["rms norm"]


def test_changed_in_place_between(rewritten: Callable[..., Any]) -> None:
    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        normed.add_(1)
        return weight * normed

    assert not rewritten(norm, (X,), weight=WEIGHT).replaced["rms norm"]
