"""Calls that come again, without Dynamo's guards. Level "fast" takes all but the inputs as it was, so that a call with
inputs of known shapes is one graph: given the inputs in its order, its results put where the model puts them.

Dynamo takes 250 us a call between kernels that have emptied the caches, this 30 (MiniLM, one text of 16 tokens: 3 ms).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from paceline.fusion.capture import CapturedGraph

PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class DirectCall:
    """`inputs`: the graph's, in order; a `_Place` is of the call's tensors. `results`: the leaves of what the model
    returns; a `_Place` is of what the graph returns. `put`: makes what the model returns of them."""

    graph: CapturedGraph
    inputs: tuple[Any, ...]
    results: tuple[Any, ...]
    put: Callable[[list[Any]], Any]

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Any:
        found = _outputs(self.graph.run([tensors[one.index] if type(one) is _Place else one for one in self.inputs]))
        return self.put([found[one.index] if type(one) is _Place else one for one in self.results])


@dataclass(frozen=True)
class _Place:
    index: int


def signature(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Hashable, list[torch.Tensor]] | None:
    """What two calls have in common that run one graph, and the call's tensors; None where an argument is no tensor
    or plain value."""
    tensors: list[torch.Tensor] = []
    parts: list[Hashable] = [len(args), *kwargs]
    for value in (*args, *kwargs.values()):
        kind = type(value)
        if kind is torch.Tensor:
            tensors.append(value)
            parts.append((value.shape, value.stride(), value.dtype, value.device))
        elif kind in PLAIN:
            parts.append((kind, value))
        else:
            return None
    return tuple(parts), tensors


def learn(
    calls: Sequence[tuple[CapturedGraph, list[Any], Any]], tensors: Sequence[torch.Tensor], result: Any
) -> DirectCall | None:
    """What a call was: `calls` are the graphs that it ran, with what they got and returned. None where it was more than
    one graph that changes nothing it is given, or something else came in or out."""
    if len(calls) != 1 or not calls[0][0].is_plain:
        return None
    graph, given, made = calls[0]
    inputs = _placed(given, tensors)
    leaves, form = pytree.tree_flatten(result)
    results = _placed(leaves, _outputs(made))
    if inputs is None or results is None:
        return None
    return DirectCall(
        graph, inputs, results, _output_of(result) or (lambda leaves: pytree.tree_unflatten(leaves, form))
    )


def _outputs(made: Any) -> Sequence[Any]:
    """What a graph returned, one after the other."""
    return made if type(made) in (tuple, list) else pytree.tree_leaves(made)


def _output_of(result: Any) -> Callable[[list[Any]], Any] | None:
    """What makes an output of transformers of its tensors: a dict of those that are not None, which are attributes too,
    without looking each of them over again (40 us a call). None for any other result."""
    kind: Any = type(result)
    names = list(result) if isinstance(result, OrderedDict) else []
    fields = dict(vars(result)) if names else {}
    if not names or not all(
        isinstance(result[name], torch.Tensor) and fields.get(name) is result[name] for name in names
    ):
        return None
    others = {name: value for name, value in fields.items() if name not in names}
    if any(value is not None for value in others.values()):
        return None

    def put(leaves: list[Any]) -> Any:
        made = kind.__new__(kind)
        vars(made).update(dict.fromkeys(fields))
        for name, leaf in zip(names, leaves, strict=True):
            OrderedDict.__setitem__(made, name, leaf)
            vars(made)[name] = leaf
        return made

    return put


def _placed(values: Sequence[Any], among: Sequence[Any]) -> tuple[Any, ...] | None:
    """The values, tensors as their places; None where a tensor is not among those, or in two places of them, or a value
    is nothing plain."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            places = [index for index, other in enumerate(among) if other is value]
            if len(places) != 1:
                return None
            found.append(_Place(places[0]))
        elif type(value) in PLAIN:
            found.append(value)
        else:
            return None
    return tuple(found)
