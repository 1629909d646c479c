"""Root-mean-square norm in a model's own words, `weight * (x * rsqrt(mean(x^2) + eps))` with conversions to float32 and
back, becomes torch's: six operations, as many passes over memory, become one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from paceline.fusion.graph import (
    argument,
    call,
    dtype_of,
    fake,
    is_op,
    operands,
    rank_of,
    replace,
    same_shape,
    shape_of,
    skip,
    tensor_and_scalar,
    weight_of,
)
from paceline.fusion.rewrite import Rewrite
from paceline.kernels.norm import rms_norm

CONVERSIONS = ("to", "float", "type", "type_as", "half", "bfloat16")


def apply(rewrite: Rewrite) -> None:
    for node in list(rewrite.graph.nodes):
        matched = _torchs_own(rewrite, node) or _weighted(rewrite, node)
        if matched is None:
            continue
        x, weight, eps = matched
        if dtype_of(x) != dtype_of(node) or not same_shape(x, node) or not rewrite.is_free(node, x):
            continue
        shape = shape_of(x)
        assert shape is not None
        new = call(rewrite.graph, node, rms_norm, (x, weight, eps), fake(node))
        replace(node, new)
        rewrite.count("rms norm")


def _torchs_own(rewrite: Rewrite, node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    if not is_op(node, "rms_norm") or len(argument(node, "normalized_shape")) != 1:
        return None
    x, weight, eps = (argument(node, name) for name in ("input", "weight", "eps"))
    dtype = dtype_of(node)
    if weight_of(rewrite.module, weight) is None or dtype is None:
        return None
    return x, weight, torch.finfo(dtype).eps if eps is None else float(eps)


def _weighted(rewrite: Rewrite, node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    pair = operands(node, "mul")
    if pair is None:
        return None
    for weight, normed in (pair, pair[::-1]):
        tensor = weight_of(rewrite.module, skip(weight, *CONVERSIONS))
        if tensor is None or tensor.dim() != 1 or not isinstance(normed, fx.Node):
            continue
        matched = _normed(skip(normed, *CONVERSIONS))
        if matched is not None and tensor.dtype == dtype_of(node):
            return matched[0], skip(weight, *CONVERSIONS), matched[1]
    return None


def _normed(node: Any) -> tuple[fx.Node, float] | None:
    """x and eps of x * rsqrt(mean(x^2) + eps), or of x / sqrt(...)."""
    for name, root in (("mul", "rsqrt"), ("div", "sqrt")):
        pair = operands(node, name) if isinstance(node, fx.Node) else None
        for x, scale in (pair, pair[::-1]) if pair is not None and name == "mul" else (pair,) if pair else ():
            scale = skip(scale, *CONVERSIONS)
            if not is_op(scale, root):
                continue
            shifted = tensor_and_scalar(argument(scale, "input"), "add")
            if shifted is None or not is_op(shifted[0], "mean"):
                continue
            mean, eps = shifted
            dim = argument(mean, "dim")
            if dim not in (-1, [-1], (-1,)) or not argument(mean, "keepdim", False) or rank_of(x) is None:
                continue
            squared = _squared(argument(mean, "input"))
            source = _behind_conversions(x)
            if squared is not None and _behind_conversions(squared) is source:
                return source, eps
    return None


def _squared(node: Any) -> fx.Node | None:
    if is_op(node, "pow") and argument(node, "exponent") == 2:
        base: fx.Node = argument(node, "input")
        return base
    if is_op(node, "square"):
        return node.args[0]  # type: ignore[no-any-return]
    pair = operands(node, "mul") if isinstance(node, fx.Node) else None
    return pair[0] if pair is not None and pair[0] is pair[1] else None


def _behind_conversions(node: Any) -> Any:
    """The tensor that was converted, whoever else uses the conversions."""
    while is_op(node, *CONVERSIONS):
        node = node.args[0]
    return node
