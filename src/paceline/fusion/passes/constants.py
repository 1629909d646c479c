"""What depends on nothing but weights and numbers is computed once: scales, masks of a fixed size, (1 + weight)."""

from __future__ import annotations

import torch
from torch import fx

from paceline.fusion.graph import constant, fake, is_op, mutates, name_of, replace, weight_of
from paceline.fusion.rewrite import Rewrite

# A result may be larger than what it is made of by so much: more would trade memory for little time.
MOST_BYTES = 1 << 20


def apply(rewrite: Rewrite) -> None:
    known: dict[fx.Node, torch.Tensor] = {}
    for node in list(rewrite.graph.nodes):
        if node.op == "get_attr":
            weight = weight_of(rewrite.module, node)
            if weight is not None:
                known[node] = weight
            continue
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


def _is_foldable(node: fx.Node, known: dict[fx.Node, torch.Tensor]) -> bool:
    if name_of(node) == "" or mutates(node) or is_op(node, "empty", "empty_like", "new_empty"):
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
