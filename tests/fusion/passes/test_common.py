"""What may be computed once, and what may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import paceline
from paceline.fusion import report

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_the_same_twice(rewritten: Callable[..., Any]) -> None:
    graph = rewritten(lambda x: torch.exp(x) + torch.exp(x) * x.exp(), (X,))
    assert graph.replaced == {"repeated": 1}  # torch.exp(x) and x.exp() are two spellings


def test_numbers_of_other_types_differ(rewritten: Callable[..., Any]) -> None:
    ids = torch.arange(4)
    graph = rewritten(lambda ids: ((ids + 2).float(), ids + 2.0), (ids,))
    assert not graph.replaced


def test_read_before_and_after_a_change(rewritten: Callable[..., Any]) -> None:
    def changed(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        first = y.sum(0)
        y.view(-1)[0] = 5
        return first, y.sum(0)

    assert not rewritten(changed, (X,)).replaced["repeated"]


def test_new_memory_that_is_changed(rewritten: Callable[..., Any]) -> None:
    def filled(x: torch.Tensor) -> torch.Tensor:
        ones, others = torch.zeros(4), torch.zeros(4)
        ones.add_(1)
        return x + ones, x + others

    assert not rewritten(filled, (X,)).replaced["repeated"]


def test_random_numbers() -> None:
    class Noisy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.rand_like(x) - torch.rand_like(x)

    model = paceline.optimize(Noisy().eval())
    assert model(X).any()
    assert model(X).any()
    assert [graph.refused for graph in report(model).graphs] == ["it draws random numbers (rand_like)"]


def test_regions_stay_paired(rewritten: Callable[..., Any]) -> None:
    def regions(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            y = x * 2
        with torch.autocast("cpu", enabled=False):
            return y + x

    assert not rewritten(regions, (X,)).replaced
