"""`x += y` on a tensor that nothing else looks at afterwards becomes `x + y`: the other passes know no memory that
changes. Models write so to save memory that the rewritten graph does not need (T5's scores, ReLU(inplace=True))."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from paceline.fusion.dynamo import storage_id
from paceline.fusion.effects import changed_by
from paceline.fusion.graph import call, dtype_of, fake, replace, same_shape, spelled
from paceline.fusion.rewrite import Rewrite

PURE: dict[str, Callable[..., Any]] = {
    "iadd": operator.add, "isub": operator.sub, "imul": operator.mul, "itruediv": operator.truediv,
    "add_": torch.add, "sub_": torch.sub, "mul_": torch.mul, "div_": torch.div,
    "masked_fill_": torch.masked_fill, "relu": F.relu, "relu_": F.relu, "silu": F.silu,
}  # fmt: skip


def apply(rewrite: Rewrite) -> None:
    order = {node: place for place, node in enumerate(rewrite.graph.nodes)}
    for node in list(rewrite.graph.nodes):
        function = PURE.get(spelled(node))
        changed = changed_by(node)
        if function is None or len(changed) != 1 or not _is_its_own(changed[0], node, order):
            continue
        others = [source for source in node.all_input_nodes if source is not changed[0]]
        if any(isinstance(fake(other), torch.Tensor) and not _fits(other, changed[0]) for other in others):
            continue
        kwargs = {name: value for name, value in node.kwargs.items() if name != "inplace"}
        args = node.args[:1] if "inplace" in node.kwargs or spelled(node) in ("relu", "relu_", "silu") else node.args
        new = call(rewrite.graph, node, function, args, fake(node).clone(), **kwargs)
        order[new] = order.pop(node)
        for user in [user for user in changed[0].users if order.get(user, -1) > order[new]]:
            user.replace_input_with(changed[0], new)
        replace(node, new)
        rewrite.graph.erase_node(node)
        rewrite.count("in place no more")


def _is_its_own(tensor: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether what `node` changes was computed in the graph, and nothing in its memory is read behind `node` but by way
    of `tensor`, or of `node`, which returns it."""
    memory = storage_id(fake(tensor))
    if not memory or not same_shape(tensor, node):
        return False
    result = {tensor, node}
    for other in sorted((one for one in order if storage_id(fake(one)) == memory), key=order.__getitem__):
        if other.op not in ("call_function", "call_method"):
            return False
        if other is tensor:
            continue  # its users behind `node` get the new value
        if order[other] < order[node] and any(order.get(user, len(order)) > order[node] for user in other.users):
            return False
        if order[other] > order[node] and result.isdisjoint(other.all_input_nodes):
            return False
        if order[other] > order[node]:
            result.add(other)
    return True


def _fits(other: fx.Node, tensor: fx.Node) -> bool:
    """Whether the result out of place is of the changed tensor's dtype."""
    return dtype_of(other) in (dtype_of(tensor), torch.bool)
