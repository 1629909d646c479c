"""What may be written out of place: nobody else looks at the memory behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def chained(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y += x
    y.mul_(3)
    return F.relu(y.view(-1), inplace=True)


def seen_before(x: torch.Tensor) -> Any:
    y = x * 2
    total = y.sum()
    y -= 1
    return y, total


def seen_behind(x: torch.Tensor) -> Any:
    y = x * 2
    z = y + 1
    z_too = y
    y -= 1
    return z, z_too * 3


def sum_behind(x: torch.Tensor) -> Any:
    y = x * 2
    part = y[1:]
    y.mul_(2)
    return y + 1, part


def view_behind(x: torch.Tensor) -> Any:
    y = x * 2
    part = y[0]
    y += 1
    return part + 1, y


def changes_a_view(x: torch.Tensor) -> Any:
    y = x * 2
    y[0].add_(1)
    return y


def changes_the_input(x: torch.Tensor) -> Any:
    x += 1
    return x * 2


def of_another_dtype(x: torch.Tensor) -> Any:
    y = x * 2
    y += x.double()
    return y


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (chained, 3),
        (seen_before, 1),
        (seen_behind, 1),
        (view_behind, 0),
        (sum_behind, 0),
        (changes_a_view, 0),
        (changes_the_input, 0),
        (of_another_dtype, 0),
    ],
)
def test_in_place(function: Callable[..., Any], count: int, rewritten: Callable[..., Any]) -> None:
    assert rewritten(function, (X,), (X + 1,)).replaced["in place no more"] == count
