"""On a CPU, a boolean mask of attention is turned into an additive one once instead of in each layer, and into none
where it masks nothing: a batch without padding pays for no mask."""

from __future__ import annotations

import torch
from torch import fx

from paceline.fusion.graph import argument, call, dtype_of, fake, is_op
from paceline.fusion.rewrite import Rewrite


def apply(rewrite: Rewrite) -> None:
    additive: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for node in list(rewrite.graph.nodes):
        if not is_op(node, "sdpa"):
            continue
        mask, query = argument(node, "attn_mask"), fake(argument(node, "query"))
        if not isinstance(query, torch.Tensor) or query.device.type != "cpu" or dtype_of(mask) != torch.bool:
            continue
        if not rewrite.is_free(node, mask):
            continue
        key = (mask, query.dtype)
        if key not in additive:
            additive[key] = call(rewrite.graph, mask.next, additive_mask, (mask, query.dtype), None)
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "attn_mask"}
        node.args = (*node.args[:3], additive[key], *node.args[4:])
        rewrite.count("mask made once")


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """0 where `mask` is true and -inf elsewhere; None where it is true everywhere."""
    if mask.all():
        return None
    return torch.zeros((), dtype=dtype).where(mask, float("-inf"))
