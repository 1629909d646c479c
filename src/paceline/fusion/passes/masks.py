"""A mask of attention is made as small as what it depends on.

Models widen one value a key to one a query and key, by an `and` with conditions that always hold, and by expand.
Attention broadcasts, and needs neither: a mask of [batch, 1, 1, keys] may be read as what it is, which keys count.
"""

from __future__ import annotations

import operator
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
    same_size,
    shape_of,
    weight_of,
)
from paceline.fusion.passes.attention import bias_of
from paceline.fusion.rewrite import Rewrite

ANDS = ("and_", "bitwise_and", "logical_and")
SAME_VALUES = ("to", "bool", "contiguous", "clone", "detach")
SAME_SET = (*SAME_VALUES, "getitem", "unsqueeze", "expand", "view", "reshape", "long", "int")


def apply(rewrite: Rewrite) -> None:
    made: dict[fx.Node, fx.Node] = {}
    for node in list(rewrite.graph.nodes):
        if node.target is bias_of:
            _shrink_parts(rewrite, node, made)
        if not is_op(node, "sdpa"):
            continue
        mask = argument(node, "attn_mask")
        if not isinstance(mask, fx.Node) or len(shape_of(mask) or ()) != 4 or not rewrite.is_free(mask):
            continue
        small = _smallest(rewrite, mask, made)
        if small is mask or len(shape_of(small) or ()) != 4:
            continue
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "attn_mask"}
        node.args = (*node.args[:3], small, *node.args[4:])
        rewrite.count("smaller mask")


def _shrink_parts(rewrite: Rewrite, node: fx.Node, made: dict[fx.Node, fx.Node]) -> None:
    def smallest(mask: Any) -> Any:
        small = _smallest(rewrite, mask, made) if rewrite.is_free(mask) else mask
        if small is mask or rank_of(small) != rank_of(mask):
            return mask
        rewrite.count("smaller mask")
        return small

    biases, fills, *others = node.args
    node.args = (
        tuple(map(smallest, biases)),  # type: ignore[arg-type]
        tuple((smallest(mask), value) for mask, value in fills),  # type: ignore[misc, union-attr]
        *others,
    )


def _smallest(rewrite: Rewrite, node: Any, made: dict[fx.Node, fx.Node]) -> Any:
    """A node that broadcasts to the same values."""
    if (view := _as_view(rewrite, node, made)) is not None:
        return view
    if is_op(node, "expand") or (is_op(node, *SAME_VALUES) and dtype_of(node) == dtype_of(node.args[0])):
        return _smallest(rewrite, node.args[0], made)
    if is_op(node, *ANDS) and dtype_of(node) == torch.bool:
        pair = node.args[:2]
        for one, other in (pair, pair[::-1]):
            if isinstance(other, fx.Node) and always_true(one):
                return _smallest(rewrite, other, made)
    if is_op(node, "where") and not any(
        isinstance(fake(arg), torch.Tensor) and fake(arg).dim() for arg in node.args[1:]
    ):
        condition = node.args[0]
        small = _smallest(rewrite, condition, made)
        if small is not condition:
            if node not in made:
                value = fake(small).to(dtype_of(node))  # of that form
                made[node] = call(rewrite.graph, node, torch.where, (small, *node.args[1:]), value)
            return made[node]
    return node


def _as_view(rewrite: Rewrite, node: Any, made: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """mask[rows, keys] with all of both in order, [batch, 1, 1, keys]: how transformers looks up a mask."""
    if not is_op(node, "getitem") or not isinstance(node.args[1], tuple) or len(node.args[1]) != 2:
        return None
    mask, places = node.args[0], node.args[1]
    sizes = shape_of(mask)
    if sizes is None or len(sizes) != 2 or not rewrite.is_free(node, mask):
        return None
    if any(not counts(rewrite, *one) for one in zip(places, sizes, (0, 3), strict=True)):
        return None
    if node not in made:
        index = (slice(None), None, None, slice(None))
        made[node] = call(rewrite.graph, node, operator.getitem, (mask, index), fake(mask)[index])
    return made[node]


def counts(rewrite: Rewrite, node: Any, size: Any, dim: int) -> bool:
    """Whether it is 0, 1, ... up to a size, along this of four dimensions."""
    weight = weight_of(rewrite.module, node)
    if weight is not None:
        return isinstance(size, int) and size == 1 and weight.shape == (1, 1, 1, 1)
    expected = tuple(slice(None) if place == dim else None for place in range(4))
    if not is_op(node, "getitem") or node.args[1] != expected or not is_op(node.args[0], "arange"):
        return False
    found = shape_of(node.args[0])
    return len(node.args[0].args) == 1 and found is not None and same_size(found[0], size)


def _is_number(value: Any) -> bool:
    """Whether it is a number, or a tensor of one."""
    return not isinstance(value, fx.Node) or shape_of(value) == ()


def always_true(node: Any) -> bool:
    """Whether every element is true, whatever the inputs are."""
    if not isinstance(node, fx.Node) or dtype_of(node) != torch.bool:
        return False
    if is_op(node, "ones", "new_ones"):
        return True
    if is_op(node, *SAME_SET):
        return always_true(node.args[0])
    if is_op(node, *ANDS):
        return all(always_true(arg) for arg in node.args[:2])
    if is_op(node, "ge"):
        return bool(node.args[1] == 0) and _not_negative(node.args[0])
    return False


def _not_negative(node: Any) -> bool:
    """Whether every element is 0 or more: positions."""
    if is_op(node, "arange"):
        # From 0 to the size given; a start is the first of two sizes.
        return len(node.args) == 1 or (isinstance(node.args[0], int) and node.args[0] >= 0)
    if is_op(node, *SAME_SET):
        return _not_negative(node.args[0])
    pair = operands(node, "add") if isinstance(node, fx.Node) else None
    return pair is not None and isinstance(pair[1], int) and pair[1] >= 0 and _not_negative(pair[0])
