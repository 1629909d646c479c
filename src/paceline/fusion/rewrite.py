"""A graph on its way through the passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from paceline.fusion.options import Options
from paceline.fusion.report import GraphReport


@dataclass
class Rewrite:
    """`parameters`: those of the model's forward, in order. `copied`: weights that the graph now holds in another form,
    so that a change of theirs must be noticed."""

    module: fx.GraphModule
    options: Options
    report: GraphReport
    parameters: Sequence[str] = ()
    copied: list[torch.Tensor] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def count(self, name: str) -> None:
        self.report.replaced[name] += 1

    def leave(self, reason: str) -> None:
        self.report.left[reason] += 1

    def is_free(self, *nodes: object) -> bool:
        """Whether none of these is changed in place, so that their uses may move."""
        return not any(isinstance(node, fx.Node) and node.meta.get("touched") for node in nodes)
