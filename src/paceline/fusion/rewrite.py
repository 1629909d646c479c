"""A graph on its way through the passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx

from paceline.fusion.graph import constant
from paceline.fusion.options import Options
from paceline.fusion.report import GraphReport


@dataclass
class Rewrite:
    """`parameters`: those of the model's forward, in order. `copied`: weights that the graph now holds in another form,
    so that a change of theirs must be noticed. `copies`: those forms by what they were made of; all graphs of a model
    share them."""

    module: fx.GraphModule
    options: Options
    report: GraphReport
    parameters: Sequence[str] = ()
    copied: list[torch.Tensor] = field(default_factory=list)
    copies: WeakValueDictionary[Hashable, Any] = field(default_factory=WeakValueDictionary)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def copy(self, made_of: Hashable, make: Callable[[], Any], hint: str, before: fx.Node) -> fx.Node:
        """A constant that is made once for all graphs of the model. `made_of`: what of, by `origin` (fusion/graph.py),
        and how."""
        value = self.copies.get(made_of)
        if value is None:
            self.copies[made_of] = value = make()
        node = constant(self.module, value, hint, before)
        node.meta["origin"] = made_of
        return node

    def count(self, name: str) -> None:
        self.report.replaced[name] += 1

    def leave(self, reason: str) -> None:
        self.report.left[reason] += 1

    def is_free(self, *nodes: object) -> bool:
        """Whether none of these is changed in place, so that their uses may move."""
        return not any(isinstance(node, fx.Node) and node.meta.get("touched") for node in nodes)
