"""On a GPU, a linear takes along what follows it: an activation, a gate, or the residual and the norm between two
blocks (kernels/cuda_linear.py)."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from paceline.fusion.gpu_linear import product, product_norm, product_only_normed, sum_norm
from paceline.fusion.graph import (
    argument,
    call,
    constant,
    dtype_of,
    fake,
    is_op,
    only_user,
    operands,
    replace,
    same_shape,
    weight_of,
)
from paceline.fusion.passes.linear import parts
from paceline.fusion.rewrite import Rewrite
from paceline.kernels import gpu
from paceline.kernels.activation import quick_gelu
from paceline.kernels.gemv import Planes
from paceline.kernels.norm import NormWeights, rms_norm

ACTIVATIONS = {"silu": "silu", "relu": "relu", "tanh": "tanh"}


def apply(rewrite: Rewrite) -> None:
    for node in list(rewrite.graph.nodes):
        if is_op(node, "linear"):
            _take_along(rewrite, node)
    for node in list(rewrite.graph.nodes):
        norm = _norm_of(rewrite, node)
        if norm is not None and _runs_kernels(node):
            _sum_before(rewrite, node, norm)


def _runs_kernels(node: fx.Node) -> bool:
    value = fake(node)
    return isinstance(value, torch.Tensor) and gpu.triton_refusal(value.device, value.dtype) is None


def _take_along(rewrite: Rewrite, node: fx.Node) -> None:
    known = parts(rewrite, node)
    if known is None or not _runs_kernels(node) or known[1].dtype != dtype_of(node):
        return
    x, weight, _ = known
    if not rewrite.is_free(node, x):
        return
    values = weight.detach()
    if not values.is_contiguous():
        rewrite.copied.append(weight)
        values = values.contiguous()
    shape = (weight.shape[0], weight.shape[1])
    planes = constant(rewrite.module, Planes("dense", shape, values), "planes", node)
    bias = argument(node, "bias")
    activation, gated, last = _followed_by(node)
    if activation is not None:
        replace(last, call(rewrite.graph, last, product, (x, planes, bias, activation, gated), fake(last)))
        rewrite.count(f"linear with {activation}{' and its gate' if gated else ''}")
        return
    if _put_before_norm(rewrite, node, (x, planes, bias)):
        return
    added = _added_to(node)
    if added is not None:
        last, residual = added
        replace(last, call(rewrite.graph, last, product, (x, planes, bias, None, False, residual), fake(last)))
        rewrite.count("linear with its residual")
        return
    replace(node, call(rewrite.graph, node, product, (x, planes, bias), fake(node)))
    rewrite.count("linear by kernel")


def _followed_by(node: fx.Node) -> tuple[str | None, bool, fx.Node]:
    """The activation of a linear, whether it gates the linear's second half, and the last node of both."""
    user = only_user(node)
    if user is not None:
        activation = _activation(user)
        if activation is not None:
            return activation, False, user
        if user.target is torch.split or is_op(user, "chunk"):
            gate = _gate(user)
            if gate is not None:
                return gate[0], True, gate[1]
    return None, False, node


def _activation(node: fx.Node) -> str | None:
    if is_op(node, "gelu"):
        return "gelu_tanh" if argument(node, "approximate", "none") == "tanh" else "gelu"
    if node.target is quick_gelu:
        return "quick_gelu"
    return next((word for name, word in ACTIVATIONS.items() if is_op(node, name)), None)


def _gate(halves: fx.Node) -> tuple[str, fx.Node] | None:
    """activation(first half) * second half, of two halves used for nothing else."""
    pieces = sorted(halves.users, key=lambda piece: str(piece.args[1]))
    if len(pieces) != 2 or [piece.args[1] for piece in pieces] != [0, 1] or not same_shape(*pieces):
        return None
    active, user = only_user(pieces[0]), only_user(pieces[1])
    if active is None or user is None or (activation := _activation(active)) is None:
        return None
    pair = operands(user, "mul")
    return (activation, user) if pair is not None and set(pair) == {active, pieces[1]} and only_user(active) else None


def _added_to(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The sum that a linear's one user makes of it, and the other term."""
    user = only_user(node)
    pair = operands(user, "add") if user is not None else None
    if user is None or pair is None:
        return None
    other = pair[1] if pair[0] is node else pair[0]
    fits = isinstance(other, fx.Node) and same_shape(other, node) and dtype_of(other) == dtype_of(node)
    return (user, other) if fits else None


def _norm_of(rewrite: Rewrite, node: fx.Node) -> NormWeights | None:
    """The weights of a norm over the last dimension."""
    if node.target is rms_norm:
        weight = weight_of(rewrite.module, node.args[1])
        return None if weight is None else NormWeights(weight, None, float(node.args[2]), centred=False)  # type: ignore[arg-type]
    if not is_op(node, "layer_norm") or len(argument(node, "normalized_shape")) != 1:
        return None
    given = [argument(node, name) for name in ("weight", "bias")]
    values = [weight_of(rewrite.module, one) for one in given]
    if any(one is not None and value is None for one, value in zip(given, values, strict=True)):
        return None
    return NormWeights(values[0], values[1], float(argument(node, "eps", 1e-5)), centred=True)


def _put_before_norm(rewrite: Rewrite, node: fx.Node, linear: tuple[Any, ...]) -> bool:
    added = _added_to(node)
    if added is None:
        return False
    total, residual = added
    found = [(user, norm) for user in total.users if (norm := _norm_of(rewrite, user)) is not None]
    if len(found) != 1 or found[0][0].args[0] is not total or dtype_of(found[0][0]) != dtype_of(total):
        return False
    normed, norm = found[0]
    if len(total.users) == 1:
        args = (*linear, residual, constant(rewrite.module, norm, "norm", normed))
        replace(normed, call(rewrite.graph, normed, product_only_normed, args, fake(normed)))
    else:  # where the sum was: its other users may come before the norm
        args = (*linear, residual, constant(rewrite.module, norm, "norm", total))
        both = call(rewrite.graph, total, product_norm, args, None)
        replace(normed, call(rewrite.graph, total, operator.getitem, (both, 0), fake(normed)))
        replace(total, call(rewrite.graph, total, operator.getitem, (both, 1), fake(total)))
    rewrite.count("linear with residual and norm")
    return True


def _sum_before(rewrite: Rewrite, node: fx.Node, norm: NormWeights) -> None:
    """residual + x, then a norm, where no linear took them."""
    total = node.args[0]
    pair = operands(total, "add") if isinstance(total, fx.Node) else None
    if pair is None or not all(isinstance(term, fx.Node) and same_shape(term, node) for term in pair):
        return
    if not rewrite.is_free(node, total) or any(dtype_of(term) != dtype_of(node) for term in pair):
        return
    assert isinstance(total, fx.Node)
    weights = constant(rewrite.module, norm, "norm", total)
    both = call(rewrite.graph, total, sum_norm, (*pair, weights), None)
    replace(node, call(rewrite.graph, total, operator.getitem, (both, 0), fake(node)))
    replace(total, call(rewrite.graph, total, operator.getitem, (both, 1), fake(total)))
    rewrite.count("norm with its residual")
