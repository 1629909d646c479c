"""Attention in a model's own words becomes torch's scaled_dot_product_attention: matmul, scale, masks and biases in any
number (ALiBi, T5's and DeBERTa's relative ones), softmax, matmul. The scores, heads x queries x keys of them, are then
never in memory.

A mask by masked_fill or where becomes an additive one with the same fill value, so that a row with no key to look at
comes out as the model has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from paceline.fusion.effects import changes_between
from paceline.fusion.graph import (
    argument,
    call,
    dtype_of,
    fake,
    is_op,
    only_user,
    operands,
    rank_of,
    replace,
    shape_of,
    tensor_and_scalar,
)
from paceline.fusion.rewrite import Rewrite

# What may stand between the scores and the softmax, or between it and the values, without changing a number.
TRANSPARENT = ("to", "float", "type", "type_as", "half", "bfloat16", "contiguous")
VIEWS = ("view", "reshape")


def apply(rewrite: Rewrite) -> None:
    for node in list(rewrite.graph.nodes):
        if not is_op(node, "matmul", "bmm"):
            continue
        weights, value = argument(node, "input"), argument(node, "other")
        softmax = _softmax_behind(weights)
        if softmax is None:
            continue
        scores = _scores(argument(softmax, "input"))
        reason = _refusal(rewrite, node, weights, softmax, scores)
        if reason is not None or scores is None:
            rewrite.leave(f"attention: {reason}")
            continue
        _replace(rewrite, node, scores, value)
        rewrite.count("attention")


@dataclass
class _Scores:
    """softmax's argument as scale * query key^T + biases. `fills`: (mask that is true where nothing is seen, value)."""

    query: fx.Node
    key: fx.Node  # [..., head_dim, keys]: as the product takes it
    scale: float = 1.0
    biases: list[fx.Node] = field(default_factory=list)
    fills: list[tuple[fx.Node, float]] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    heads: int | None = None  # where the product is [B H, S, S] and a view of it takes the heads apart


def _softmax_behind(node: Any) -> fx.Node | None:
    while is_op(node, *TRANSPARENT, *VIEWS) and only_user(node) is not None:
        node = node.args[0]
    return node if is_op(node, "softmax") else None


def _scores(node: Any) -> _Scores | None:
    """From the softmax's argument down to the product of queries and keys."""
    biases: list[fx.Node] = []
    fills: list[tuple[fx.Node, float]] = []
    scale, nodes, heads, merged = 1.0, [], None, False
    while isinstance(node, fx.Node):
        nodes.append(node)
        if is_op(node, "matmul", "bmm", "baddbmm") and merged and heads is None:
            return None
        if is_op(node, "matmul", "bmm"):
            query, key = argument(node, "input"), argument(node, "other")
            return _Scores(query, key, scale, biases, fills, nodes, heads)
        if is_op(node, "baddbmm"):
            alpha = argument(node, "alpha", 1)  # bias + alpha query key^T: Falcon and BLOOM add ALiBi so
            if argument(node, "beta", 1) != 1 or scale != 1.0 or not isinstance(alpha, (int, float)):
                return None
            query, key = argument(node, "batch1"), argument(node, "batch2")
            return _Scores(query, key, float(alpha), [*biases, argument(node, "input")], fills, nodes, heads)
        if is_op(node, *VIEWS) and (rank_of(node), rank_of(node.args[0])) == (4, 3):
            heads = (shape_of(node) or ())[1]
            if not isinstance(heads, int):
                return None
            node = node.args[0]
        elif is_op(node, *VIEWS) and (rank_of(node), rank_of(node.args[0])) == (3, 4) and heads is None:
            merged, node = True, node.args[0]
        elif is_op(node, *TRANSPARENT):
            node = node.args[0]
        elif is_op(node, "masked_fill") and isinstance(argument(node, "value"), (int, float)) and scale == 1.0:
            fills.append((argument(node, "mask"), float(argument(node, "value"))))
            node = argument(node, "input")
        elif (pair := operands(node, "add")) is not None and scale == 1.0:
            side = next((i for i in (0, 1) if _leads_to_product(pair[i])), None)
            if side is None or not isinstance(pair[1 - side], fx.Node):
                return None
            biases.append(pair[1 - side])
            node = pair[side]
        elif (scaled := tensor_and_scalar(node, "mul")) is not None:
            node, scale = scaled[0], scale * scaled[1]
        elif (divided := tensor_and_scalar(node, "div")) is not None:
            node, scale = divided[0], scale / divided[1]
        else:
            return None
    return None


def _leads_to_product(node: Any) -> bool:
    for _ in range(12):
        if is_op(node, "matmul", "bmm", "baddbmm"):
            return True
        if is_op(node, *TRANSPARENT, *VIEWS, "masked_fill"):
            node = node.args[0]
        elif isinstance(node, fx.Node) and (pair := operands(node, "add")) is not None:
            return _leads_to_product(pair[0]) or _leads_to_product(pair[1])
        elif (scaled := tensor_and_scalar(node, "mul") or tensor_and_scalar(node, "div")) is not None:
            node = scaled[0]
        else:
            return False
    return False


def _refusal(rewrite: Rewrite, node: fx.Node, weights: fx.Node, softmax: fx.Node, scores: _Scores | None) -> str | None:
    """Why an attention stays as the model spells it."""
    if scores is None:
        return "something other than scales, masks and biases stands before its softmax"
    rank = rank_of(softmax)
    if rank is None or argument(softmax, "dim") not in (-1, rank - 1):
        return "its softmax is not over the keys"
    if any(only_user(inner) is None for inner in (weights, softmax, *scores.nodes)):
        return "its scores or weights are used elsewhere: they are a result, say"
    if not rewrite.is_free(node, weights, softmax, *scores.nodes):
        return "something in it is changed in place"
    if any(changes_between(inner, node, inner.all_input_nodes) for inner in scores.nodes):
        return "something it reads is changed in place before its end"
    if dtype_of(scores.query) != dtype_of(node) or dtype_of(scores.key) != dtype_of(node):
        return "its queries, keys and result are not of one dtype"
    shapes = [shape_of(tensor) for tensor in (scores.query, scores.key)]
    if any(shape is None or len(shape) not in (3, 4) for shape in shapes):
        return "its queries and keys are not of three or four dimensions"
    bias_ranks = [rank_of(bias) for bias in (*scores.biases, *(mask for mask, _ in scores.fills))]
    if any(bias_rank is None or bias_rank > 4 for bias_rank in bias_ranks):
        return "a mask or bias of it is no tensor of at most four dimensions"
    if any(isinstance(fake(bias), torch.Tensor) and fake(bias).dtype == torch.bool for bias in scores.biases):
        return "a boolean is added to its scores"
    return None


def _replace(rewrite: Rewrite, node: fx.Node, scores: _Scores, value: fx.Node) -> None:
    graph, heads = rewrite.graph, scores.heads
    query, key = scores.query, _turned_back(scores.key)
    if key is None:
        key = call(graph, node, torch.transpose, (scores.key, -1, -2), _turned(fake(scores.key)))
    if heads is not None:
        query, key, value = (call(graph, node, _apart, (part, heads), None) for part in (query, key, value))
    bias = None
    if scores.biases or scores.fills:
        parts = (tuple(scores.biases), tuple(scores.fills), dtype_of(node), heads)
        bias = call(graph, node, bias_of, parts, None)
    y = call(
        graph, node, F.scaled_dot_product_attention, (query, key, value), fake(node), attn_mask=bias, scale=scores.scale
    )
    replace(node, y if heads is None else call(graph, node, torch.flatten, (y, 0, 1), fake(node)))


def _turned_back(key: fx.Node) -> fx.Node | None:
    """The keys whose last two dimensions the model exchanged for its product."""
    rank = rank_of(key)
    if not is_op(key, "transpose") or rank is None:
        return None
    dims = {argument(key, "dim0") % rank, argument(key, "dim1") % rank}
    return argument(key, "input") if dims == {rank - 1, rank - 2} else None


def _turned(value: Any) -> Any:
    return value.transpose(-1, -2) if isinstance(value, torch.Tensor) else None


def bias_of(
    biases: tuple[torch.Tensor, ...],
    fills: tuple[tuple[torch.Tensor, float], ...],
    dtype: torch.dtype,
    heads: int | None,
) -> torch.Tensor:
    """What is added to the scores: the biases, and where a mask of `fills` is true its value in their place. With
    `heads`, those of [B H, S, S] as [B, H, S, S]."""
    bias: torch.Tensor | None = None
    for one in biases:
        apart = _heads_apart(one, heads)
        bias = apart if bias is None else bias + apart
    for mask, fill in fills:
        below = torch.zeros((), dtype=dtype, device=mask.device) if bias is None else bias
        bias = torch.where(_heads_apart(mask, heads), fill, below)
    assert bias is not None
    return bias.to(dtype)


def _heads_apart(bias: torch.Tensor, heads: int | None) -> torch.Tensor:
    if heads is None or bias.dim() != 3:
        return bias
    return bias.unsqueeze(0) if bias.shape[0] == 1 else _apart(bias, heads)


def _apart(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.reshape(-1, heads, *tensor.shape[1:])
