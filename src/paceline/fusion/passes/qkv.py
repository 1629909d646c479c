"""Linears of one input become one: queries, keys and values, or gate and up. One product of three times the width fills
the device better than three, and its input is read once.

The joined weight is a copy: the model's own stay as they are.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.nn import functional as F

from paceline.fusion.graph import argument, call, constant, fake, is_op, origin, replace
from paceline.fusion.passes.linear import parts
from paceline.fusion.rewrite import Rewrite

# Beyond this a joined weight would be a copy of most of the model for little: the output layers of several heads, say.
MOST_ROWS = 1 << 17


def apply(rewrite: Rewrite) -> None:
    together: dict[fx.Node, list[fx.Node]] = {}
    for node in rewrite.graph.nodes:
        if is_op(node, "linear") and isinstance(x := argument(node, "input"), fx.Node) and parts(rewrite, node):
            together.setdefault(x, []).append(node)
    for linears in together.values():
        if len(linears) > 1 and rewrite.is_free(*linears, argument(linears[0], "input")):
            _join(rewrite, linears)


def _join(rewrite: Rewrite, linears: list[fx.Node]) -> None:
    known = [parts(rewrite, node) for node in linears]
    weights = [part[1] for part in known if part is not None]
    biases = [part[2] for part in known if part is not None]
    if len({(w.dtype, w.device) for w in weights}) > 1 or sum(w.shape[0] for w in weights) > MOST_ROWS:
        rewrite.leave("linears of one input: their weights differ in dtype or device, or are too large to copy")
        return
    if len({id(w) for w in weights}) < len(weights):
        rewrite.leave("linears of one input: two of them are one")
        return
    first = linears[0]
    rewrite.copied.extend(weights)
    made_of = "joined", *(origin(rewrite.module, argument(node, "weight")) for node in linears)
    joined = rewrite.copy(made_of, lambda: torch.cat(weights).detach(), "joined_weight", first)
    bias_node = None
    if any(bias is not None for bias in biases):
        filled = [
            weight.new_zeros(weight.shape[0]) if bias is None else bias
            for weight, bias in zip(weights, biases, strict=True)
        ]
        rewrite.copied.extend(bias for bias in biases if bias is not None)
        bias_node = constant(rewrite.module, torch.cat(filled).detach(), "joined_bias", first)
    x = argument(first, "input")
    value = torch.cat([fake(node) for node in linears], -1)
    y = call(rewrite.graph, first, F.linear, (x, joined, bias_node), value)
    sizes = [weight.shape[0] for weight in weights]
    split = call(rewrite.graph, first, torch.split, (y, sizes, -1), None)
    for index, node in enumerate(linears):
        piece = call(rewrite.graph, first, operator.getitem, (split, index), fake(node))
        replace(node, piece)
    rewrite.count(f"{len(linears)} linears as one")
