"""A rewritten graph's results lie in memory of their own where the captured graph's do: a caller may write to what a
model returns, view it in another shape, and keep it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from paceline.fusion.dynamo import storage_id


def own_results(
    rewritten: fx.GraphModule,
    captured: tuple[Any, Sequence[Any]],
    found: tuple[Any, Sequence[Any]],
    weights: Sequence[torch.Tensor],
) -> None:
    """Let the graph copy each result that shares memory, holds on to memory or is laid out otherwise than the captured
    graph's. `captured` and `found`: results and inputs of both."""
    output = next(node for node in rewritten.graph.nodes if node.op == "output")
    places, form = pytree.tree_flatten(output.args[0])
    expected, results = pytree.tree_leaves(captured[0]), pytree.tree_leaves(found[0])
    if not len(places) == len(expected) == len(results):
        raise ValueError("results of another form")
    constants = list(vars(rewritten).values())
    for index, (place, old, new) in enumerate(zip(places, expected, results, strict=True)):
        if not isinstance(place, fx.Node) or storage_id(old) is None or storage_id(new) is None:
            continue
        shared = _shared(new, [*results[:index], *found[1], *weights])
        if (
            not shared <= _shared(old, [*expected[:index], *captured[1], *weights])
            or _shared(new, constants) - _shared(old, constants)
            or new.untyped_storage().nbytes() > old.untyped_storage().nbytes()
            or (old.is_contiguous() and not new.is_contiguous())
        ):
            with rewritten.graph.inserting_before(output):
                layout = torch.contiguous_format if old.is_contiguous() else torch.preserve_format
                places[index] = rewritten.graph.call_function(torch.clone, (place,), {"memory_format": layout})
    output.args = (pytree.tree_unflatten(places, form),)
    rewritten.recompile()


def _shared(tensor: torch.Tensor, others: Sequence[Any]) -> set[int]:
    """The places of those that lie in one memory with `tensor`."""
    own = storage_id(tensor)
    return {place for place, other in enumerate(others) if storage_id(other) == own}
