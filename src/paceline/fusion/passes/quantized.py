"""On request, the weights of linears are stored in a format of paceline's (formats/): smaller, and not lossless. What
that costs is measured when a graph is captured, and in the report.

The packed weight is a copy: the model's own stays as it is.
"""

from __future__ import annotations

import torch
from torch import fx

from paceline.formats import FORMATS, Weight
from paceline.fusion.graph import argument, call, fake, is_op, origin, replace
from paceline.fusion.passes.linear import parts
from paceline.fusion.rewrite import Rewrite

LEAST = 64  # rows and columns: smaller matrices hold no bytes worth saving, and groups do not divide them


def apply(rewrite: Rewrite) -> None:
    name = rewrite.options.quantize
    if name is None:
        return
    for node in list(rewrite.graph.nodes):
        if is_op(node, "linear"):
            _pack(rewrite, node, name)


def _pack(rewrite: Rewrite, node: fx.Node, name: str) -> None:
    known = parts(rewrite, node)
    if known is None or not rewrite.is_free(node, known[0]):
        return
    x, values, _ = known
    if min(values.shape) < LEAST:
        rewrite.leave(f"{name}: a matrix has fewer than {LEAST} rows or columns")
        return
    made_of = name, origin(rewrite.module, argument(node, "weight"))
    weight = rewrite.copy(made_of, lambda: FORMATS[name].pack(values.detach()), name.replace("-", "_"), node)
    rewrite.copied.append(values)
    replace(node, call(rewrite.graph, node, product, (x, weight, argument(node, "bias")), fake(node)))
    rewrite.count(f"{name} linear")


def product(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """x w^T + b over the last dimension."""
    return weight.matmul(x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], weight.shape[0])
