"""Masks that models build of places and of which keys count: what of them a kernel may be asked for."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from paceline.fusion.graph import name_of
from paceline.fusion.options import Options
from paceline.fusion.passes.distances import taken_apart
from paceline.fusion.report import GraphReport
from paceline.fusion.rewrite import Rewrite
from paceline.kernels.flash_attention import Keys

Condition = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
BATCH, LENGTH = 2, 9


def found_in(condition: Condition) -> tuple[torch.Tensor, tuple[torch.Tensor | None, Keys] | None]:
    """A mask, and what it was taken apart into."""

    def masked(mask_BS: torch.Tensor) -> torch.Tensor:
        places = torch.arange(mask_BS.shape[1])
        return condition(places[None, None, :, None], places[None, None, None, :], mask_BS[:, None, None, :])

    class Shapes(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            node.meta["example_value"] = super().run_node(node)
            return node.meta["example_value"]

    module = fx.symbolic_trace(masked)
    mask = Shapes(module).run(torch.arange(LENGTH) < torch.tensor([[LENGTH], [4]]))
    rewrite = Rewrite(module, Options(), GraphReport(0))
    found = taken_apart(rewrite, next(iter(module.graph.find_nodes(op="output"))).args[0])
    if found is None:
        return mask, None
    return mask, (None if found[0] is None else found[0].meta["example_value"], found[1])


def test_the_size_of_a_distance_in_two_words() -> None:
    """Dynamo writes abs() as a function, and of torch 2.11 as a method."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert name_of(graph.call_function(abs, (x,))) == name_of(graph.call_method("__abs__", (x,))) == "abs"


def near(q: torch.Tensor, k: torch.Tensor, size: int) -> torch.Tensor:
    return operator.le(operator.sub(q, k).abs(), size)


@pytest.mark.parametrize(
    ("condition", "keys", "of_keys"),
    [
        (lambda q, k, m: near(q, k, 3) & m, Keys(window=3), True),
        (lambda q, k, m: m & near(k, q, 0), Keys(window=0), True),
        (lambda q, k, m: (k <= q) & m, Keys(causal=True), True),
        (lambda q, k, m: q >= k, Keys(causal=True), False),
        (lambda q, k, m: (k > q - 3) & ((k <= q) & m), Keys(causal=True, window=2), True),
        (lambda q, k, m: near(q, k, 3) & near(q, k, 2) & (k <= q), Keys(causal=True, window=2), False),
        (lambda q, k, m: (m & (q >= 0) & near(q, k, 1)).expand(BATCH, 1, LENGTH, LENGTH), Keys(window=1), True),
        (lambda q, k, m: m & (k <= q) & m, Keys(causal=True), True),
    ],
)
def test_what_is_found_is_the_mask(condition: Condition, keys: Keys, of_keys: bool) -> None:
    mask, found = found_in(condition)
    assert found is not None
    assert found[1] == keys
    assert (found[0] is not None) == of_keys
    places = torch.arange(LENGTH)
    distance = places[:, None] - places
    seen = torch.ones(BATCH, 1, 1, 1, dtype=torch.bool) if found[0] is None else found[0]
    seen = seen & (distance >= (0 if keys.causal else -LENGTH))
    seen = seen & (distance.abs() <= (LENGTH if keys.window is None else keys.window))
    assert torch.equal(seen, mask.expand(BATCH, 1, LENGTH, LENGTH))


@pytest.mark.parametrize(
    "condition",
    [
        lambda q, k, m: (k < q) & m,
        lambda q, k, m: (q <= k) & m,
        lambda q, k, m: (k > q - 3) & m,
        lambda q, k, m: (k <= q) & (k >= q - 3),
        lambda q, k, m: near(q + 1, k, 3) & m,
        lambda q, k, m: near(q, k, -1) & m,
        lambda q, k, m: ((q - k).abs() < 3) & m,
        lambda q, k, m: near(q, k, 3) | m,
        lambda q, k, m: near(q, k, 3) & m & ~m,
        lambda q, k, m: near(q, k.flip(3), 3) & m,
        lambda q, k, m: near(q, k, 3).float() * m,
        lambda q, k, m: (near(q, k, 3) & m)[:, 0],
    ],
)
def test_everything_else_stays(condition: Condition) -> None:
    assert found_in(condition)[1] is None
