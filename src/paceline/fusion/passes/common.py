"""What is computed twice is computed once: models build the same mask for each layer, or for each kind of layer."""

from __future__ import annotations

from typing import Any

from torch import fx

from paceline.fusion.effects import has_effect
from paceline.fusion.graph import name_of, replace
from paceline.fusion.rewrite import Rewrite


def apply(rewrite: Rewrite) -> None:
    first: dict[Any, fx.Node] = {}
    for node in list(rewrite.graph.nodes):
        if not _is_pure(node) or has_effect(node) or not rewrite.is_free(node, *node.all_input_nodes):
            continue
        key = (node.op, node.target, _key(node.args), _key(node.kwargs))
        try:
            earlier = first.setdefault(key, node)
        except TypeError:  # an argument that cannot be hashed
            continue
        if earlier is not node:
            replace(node, earlier)
            rewrite.count("repeated")


def _is_pure(node: fx.Node) -> bool:
    """torch's functions (a graph that draws random numbers never gets here), and what passes have put in."""
    return name_of(node) != "" or getattr(node.target, "__module__", "").startswith("paceline.fusion")


def _key(value: Any) -> Any:
    """Something to hash. With types: 1, 1.0 and True are equal in Python and not to torch."""
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_key, value))
    if isinstance(value, dict):
        return ("dict", *((key, _key(item)) for key, item in sorted(value.items())))
    if isinstance(value, slice):
        return ("slice", _key(value.start), _key(value.stop), _key(value.step))
    return (type(value).__name__, value)
