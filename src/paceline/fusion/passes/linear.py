"""x W + b as addmm over rows, with W stored input by output (GPT-2's Conv1D), becomes a linear: one word for the passes
behind this one."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional as F

from paceline.fusion.graph import argument, call, constant, fake, is_op, replace, weight_of
from paceline.fusion.rewrite import Rewrite


def apply(rewrite: Rewrite) -> None:
    for node in list(rewrite.graph.nodes):
        if is_op(node, "addmm"):
            _addmm(rewrite, node)


def _addmm(rewrite: Rewrite, node: fx.Node) -> None:
    bias, x, weight = (argument(node, name) for name in ("input", "mat1", "mat2"))
    values = weight_of(rewrite.module, weight)
    offset = weight_of(rewrite.module, bias)
    if values is None or offset is None or offset.dim() != 1 or not rewrite.is_free(node, x):
        return
    if argument(node, "beta", 1) != 1 or argument(node, "alpha", 1) != 1:
        return
    if len(weight.users) > 1:
        rewrite.leave("a matrix stored input by output is used more than once")
        return
    # A view: nothing is copied, and what is written to the weight is seen.
    turned = constant(rewrite.module, values.t(), "turned", node)
    replace(node, call(rewrite.graph, node, F.linear, (x, turned, bias), fake(node)))
    rewrite.count("linear")


def parts(rewrite: Rewrite, node: fx.Node) -> tuple[fx.Node, torch.Tensor, torch.Tensor | None] | None:
    """x, weight [N, K] and bias [N] of a linear whose weight and bias are constants."""
    weight = weight_of(rewrite.module, argument(node, "weight"))
    given = argument(node, "bias")
    bias = weight_of(rewrite.module, given)
    if weight is None or weight.dim() != 2 or (given is not None and bias is None):
        return None
    return argument(node, "input"), weight, bias
