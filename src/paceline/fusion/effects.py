"""What a captured graph does besides computing: memory that it changes, random numbers that it draws."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from paceline.fusion.dynamo import is_random, is_transform, storage_id, written_arguments
from paceline.fusion.graph import OPERATORS, argument, fake, spelled

IN_PLACE_OPERATORS = {
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift",
    "irshift",
}  # fmt: skip
# Functions that change an argument only where another asks for it: the changed ones' places, the other's name.
CHANGE_ON_DEMAND = {
    "batch_norm": ((1, 2), "training"),
    "instance_norm": ((1, 2), "use_input_stats"),
    "embedding": ((1,), "max_norm"),
    "embedding_bag": ((1,), "max_norm"),
}


def refusal(graph: fx.Graph) -> str | None:
    """Why no pass may touch a graph. Asked of a graph whose nodes are marked (mark_touched)."""
    for node in graph.nodes:
        name = spelled(node)
        if _draws(node):
            return f"it draws random numbers ({name})"
        if name == "_enter_autocast" and (len(node.args) < 3 or node.args[2]):
            return "a part of it runs under autocast"
        if node.op == "get_attr" and node.meta["touched"]:
            return f"it changes a weight or buffer of the model ({node.meta.get('source', node.target)})"
    return None


def changed_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node changes in place, or may."""
    if node.op not in ("call_function", "call_method"):
        return []
    name = spelled(node)
    changed: list[Any] = [node.kwargs.get("out")]
    declared = written_arguments(node.target)
    if declared is not None:
        changed += [node.args[place] for place in declared if place < len(node.args)]
        changed += [node.kwargs.get(written) for written in declared.values()]
    elif node.kwargs.get("inplace") or _is_in_place(node, name):
        changed += node.args[:1] or node.all_input_nodes[:1]
    elif name in CHANGE_ON_DEMAND and argument(node, CHANGE_ON_DEMAND[name][1]):
        changed += [node.args[place] for place in CHANGE_ON_DEMAND[name][0] if place < len(node.args)]
    found: list[fx.Node] = []
    fx.map_arg(changed, found.append)
    return found


def has_effect(node: fx.Node) -> bool:
    """Whether a node does something though nobody uses its result. (fx knows in-place functions, but no methods.)"""
    return node.is_impure() or is_transform(node.target) or bool(changed_by(node))


def mark_touched(graph: fx.Graph) -> None:
    """Set meta["touched"] of each node: whether its value lies in memory that the graph changes in place. Fake tensors
    share memory where the real ones will, so that no list of views is needed."""
    direct: set[fx.Node] = set()
    for node in graph.nodes:
        changed = changed_by(node)
        if changed:
            direct.update(changed, [node])
    memory = {0, *(place for node in direct for place in memory_of(node))}  # 0: what lies there is not known
    for node in graph.nodes:
        node.meta["touched"] = node in direct or not memory.isdisjoint(memory_of(node))


def changes_between(first: fx.Node, last: fx.Node, values: Iterable[object]) -> bool:
    """Whether a node from `first` to before `last` changes one of these values in place."""
    touched = {value for value in values if isinstance(value, fx.Node) and value.meta.get("touched")}
    if not touched:
        return False
    memory = {place for value in touched for place in memory_of(value)}
    node = first
    while node is not last and node.op != "output":
        for changed in changed_by(node):
            if changed in touched or not memory.isdisjoint(memory_of(changed)):
                return True
        node = node.next
    return False


def memory_of(node: fx.Node) -> set[int]:
    """Where a node's tensors lie, by storage_id: equal places are one memory."""
    value = fake(node)
    values = value if isinstance(value, (list, tuple)) else [value]
    return {place for item in values if (place := storage_id(item)) is not None}


def _is_in_place(node: fx.Node, name: str) -> bool:
    if name in ("setitem", "set_"):
        return True
    if node.op == "call_function" and getattr(node.target, "__module__", "") in OPERATORS:
        return name in IN_PLACE_OPERATORS  # operator.and_ changes nothing
    return name.endswith("_") and not name.endswith("__")


def _draws(node: fx.Node) -> bool:
    name = spelled(node)
    if name == "scaled_dot_product_attention":
        return bool(argument(node, "dropout_p", 0.0))
    if "dropout" in name:  # dropout1d, alpha_dropout, ...: all take p and training as dropout does
        given = dict(zip(("p", "training"), node.args[1:3], strict=False)) | dict(node.kwargs)
        return given.get("training", True) is not False and bool(given.get("p", 0.5) != 0)
    return node.op in ("call_function", "call_method") and is_random(node.target)
