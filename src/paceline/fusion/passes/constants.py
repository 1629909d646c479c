"""What depends on nothing but weights and numbers is computed once: scales, masks of a fixed size, (1 + weight)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from paceline.fusion.graph import argument, constant, fake, is_op, name_of, replace, weight_of
from paceline.fusion.rewrite import Rewrite

# A result may be larger than what it is made of by so much: more would trade memory for little time.
MOST_BYTES = 1 << 20


def apply(rewrite: Rewrite) -> None:
    for node in list(rewrite.graph.nodes):
        number = _number(node)
        if number is not None:
            _put_number(node, number)
    known: dict[fx.Node, torch.Tensor] = {}
    for node in list(rewrite.graph.nodes):
        if node.op == "get_attr":
            weight = weight_of(rewrite.module, node)
            if weight is not None:
                known[node] = weight
            continue
        if is_op(node, "masked_fill") and (fill := argument(node, "value")) in known and known[fill].dim() == 0:
            rewrite.copied.append(known[fill])
            node.args, node.kwargs = (*node.args[:2], known[fill].item()), {}
        if not _is_foldable(node, known) or not rewrite.is_free(node, *node.all_input_nodes):
            continue
        value = _evaluated(node, known)
        if value is None:
            continue
        sources = [known[source] for source in node.all_input_nodes]
        if value.nbytes > MOST_BYTES + sum(tensor.nbytes for tensor in sources):
            continue
        folded = constant(rewrite.module, value, "folded", node)
        replace(node, folded)
        known[folded] = value
        rewrite.copied.extend(sources)
        rewrite.count("constant")


def _number(node: fx.Node) -> int | float | None:
    """What a node computes from sizes that have turned out to be fixed: width // heads, its square root."""
    value = fake(node)
    if node.op not in ("call_function", "call_method"):
        return None
    if isinstance(value, torch.SymInt):
        value = value.node.maybe_as_int()
    elif isinstance(value, torch.SymFloat):
        value = value.node.maybe_as_float()
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _put_number(node: fx.Node, number: int | float) -> None:
    def put(value: fx.Node) -> Any:
        return number if value is node else value

    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg(user.args, put), fx.map_arg(user.kwargs, put)


def _is_foldable(node: fx.Node, known: dict[fx.Node, torch.Tensor]) -> bool:
    if name_of(node) == "" or is_op(node, "empty", "empty_like", "new_empty"):
        return False
    if not isinstance(fake(node), torch.Tensor):
        return False
    return all(source in known for source in node.all_input_nodes)


def _evaluated(node: fx.Node, known: dict[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: known[source])
    try:
        with torch.no_grad():
            if node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
    except (TypeError, RuntimeError):  # an argument that is a symbol of a size, say
        return None
    return value if isinstance(value, torch.Tensor) else None
