"""Each spelling of an activation that the pass claims, and what looks like one and is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

X = torch.linspace(-4, 4, 60).view(3, 4, 5)
ROOT = math.sqrt(2 / math.pi)

GELUS = {
    "tanh, pow": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
    "tanh, products": lambda x: x * 0.5 * (1.0 + torch.tanh((x + 0.044715 * x * x * x) * ROOT)),
    "tanh, number at the end": lambda x: x * (torch.tanh(ROOT * (x + x**3 * 0.044715)) + 1) / 2,
    "tanh, x taken out": lambda x: 0.5 * x * (1.0 + torch.tanh(x * ROOT * (1.0 + 0.044715 * x * x))),
    "erf": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "erf, factors turned": lambda x: (torch.erf(x * (1 / math.sqrt(2.0))) + 1.0) * x * 0.5,
}
SILUS = {"sigmoid": lambda x: x * torch.sigmoid(x), "method": lambda x: x.sigmoid() * x}
QUICK = {"sigmoid": lambda x: x * torch.sigmoid(1.702 * x)}
SPELLINGS = {"gelu": GELUS, "silu": SILUS, "quick gelu": QUICK}
NONE = {
    "a square in the cube's place": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**2))),
    "another constant": lambda x: 0.5 * x * (1 + torch.erf(x / 1.5)),
    "another cube": lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.05 * x**3))),
    "another argument": lambda x: 0.5 * x * (1 + torch.erf((x + 1) / math.sqrt(2))),
    "another factor": lambda x: 0.4 * x * (1 + torch.erf(x / math.sqrt(2))),
    "a sigmoid of something else": lambda x: x * torch.sigmoid(1.5 * x),
    "no gate of its own": lambda x: (x + 1) * torch.sigmoid(x),
}


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        (name, spelling)
        for name, found in (("gelu", GELUS), ("silu", SILUS), ("quick gelu", QUICK))
        for spelling in found
    ],
)
def test_spellings(name: str, spelling: str, rewritten: Callable[..., Any]) -> None:
    assert rewritten(SPELLINGS[name][spelling], (X,), (X * 2,)).replaced == {name: 1}


@pytest.mark.parametrize("name", NONE)
def test_what_is_none(name: str, rewritten: Callable[..., Any]) -> None:
    assert not set(rewritten(NONE[name], (X,)).replaced) & {"gelu", "silu", "quick gelu"}


def test_changed_in_place_between(rewritten: Callable[..., Any]) -> None:
    def gated(x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(x)
        gate.mul_(2)
        return x * gate

    assert not rewritten(gated, (X,)).replaced.keys() & SPELLINGS.keys()
