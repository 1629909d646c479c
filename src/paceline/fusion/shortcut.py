"""Calls whose way through Dynamo is known: at level "fast" a second call with the same kinds of arguments goes to its
captured graph at once.

Dynamo's guards and the code around a graph take 90 us of a host that then launches BERT-base in 50. They ask whether
the model and what surrounds it have changed, which level "fast" takes as it was; what is left are the arguments, and
how the graph's inputs follow from them and the result from its outputs, which one call shows by identity.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from paceline.fusion.capture import CapturedGraph

PLAIN = (type(None), bool, int, float, str)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def key_of(arguments: Arguments) -> Hashable | None:
    """The same for calls that Dynamo would not tell apart; None for arguments that are more than tensors and plain
    values, or one tensor twice."""
    args, kwargs = arguments
    key: list[Hashable] = [torch.is_inference_mode_enabled(), len(args), *kwargs]
    tensors = set()
    for value in (*args, *kwargs.values()):
        if type(value) is torch.Tensor:
            key.append((value.shape, value.stride(), value.dtype, value.device, value.layout))
            if id(value) in tensors:
                return None
            tensors.add(id(value))
        elif type(value) in PLAIN:
            key.append((type(value), value))
        else:
            return None
    return tuple(key)


@dataclass(frozen=True)
class Taken:
    """A place among the call's arguments, by position or name."""

    place: int | str

    def of(self, arguments: Arguments) -> Any:
        return arguments[0][self.place] if isinstance(self.place, int) else arguments[1][self.place]


@dataclass(frozen=True)
class Shortcut:
    """`inputs`: of the graph, each an argument or a number that follows from shapes. `leaves`: of the result, each the
    place of an output or None, in `form`."""

    graph: CapturedGraph
    inputs: tuple[Taken | int | float, ...]
    leaves: tuple[int | None, ...]
    form: pytree.TreeSpec

    def __call__(self, arguments: Arguments) -> Any:
        inputs = [value.of(arguments) if isinstance(value, Taken) else value for value in self.inputs]
        outputs = self.graph.run(inputs)
        return pytree.tree_unflatten([None if place is None else outputs[place] for place in self.leaves], self.form)


def learn(
    arguments: Arguments, calls: Sequence[tuple[CapturedGraph, list[Any], Sequence[Any]]], result: Any
) -> Shortcut | None:
    """What a call has shown: the graphs that it ran with their inputs and outputs, and its result. None where these are
    not all there is to it."""
    if len(calls) != 1:
        return None
    graph, given, outputs = calls[0]
    if not graph.pure:
        return None
    places = {id(value): Taken(place) for place, value in enumerate(arguments[0])}
    places |= {id(value): Taken(name) for name, value in arguments[1].items()}
    inputs: list[Taken | int | float] = []
    for value in given:
        if type(value) in (int, float):
            inputs.append(value)
        elif isinstance(value, torch.Tensor) and id(value) in places:
            inputs.append(places[id(value)])
        else:
            return None
    made = {id(value): place for place, value in enumerate(outputs) if isinstance(value, torch.Tensor)}
    leaves, form = pytree.tree_flatten(result)
    if any(leaf is not None and id(leaf) not in made for leaf in leaves):
        return None
    return Shortcut(graph, tuple(inputs), tuple(None if leaf is None else made[id(leaf)] for leaf in leaves), form)
