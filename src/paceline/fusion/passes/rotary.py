"""Rotary embedding in a model's own words, `x * cos + rotate_half(x) * sin` with conversions to float32 and back, of a
whole head or its first elements, becomes one node: five to eight passes over queries and over keys become three, and
passes/heads.py takes the node along."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

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
    same_size,
    shape_of,
)
from paceline.fusion.passes.norms import CONVERSIONS
from paceline.fusion.rewrite import Rewrite
from paceline.fusion.rotary import angles, rotate


def apply(rewrite: Rewrite) -> None:
    made: dict[tuple[fx.Node, fx.Node, Any], fx.Node] = {}
    for node in list(rewrite.graph.nodes):
        found = _rotation(node)
        if found is None:
            continue
        x, cos, sin = found
        last, x = _with_conversions(node, x)
        last, x = _with_the_rest(last, x)
        if dtype_of(last) != dtype_of(x) or not rewrite.is_free(node, last, x, cos, sin):
            continue
        batch = _batch(rewrite.graph, x)
        if batch is None:
            continue
        key = cos, sin, batch
        if key not in made:
            made[key] = call(rewrite.graph, node, angles, key, _fake_angles(cos, x))
        replace(last, call(rewrite.graph, last, rotate, (x, made[key]), fake(last)))
        rewrite.count("rotary embedding")


def _rotation(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """x, cos and sin of x * cos + rotate_half(x) * sin."""
    pair = operands(node, "add")
    if pair is None or rank_of(node) != 4:
        return None
    for straight, crossed in (pair, pair[::-1]):
        for x, cos in _factors(straight):
            for half_turned, sin in _factors(crossed):
                if _turns(half_turned, x) and _are_angles(cos, x) and _are_angles(sin, x):
                    return x, cos, sin
    return None


def _factors(node: Any) -> Iterator[tuple[fx.Node, fx.Node]]:
    pair = operands(node, "mul") if isinstance(node, fx.Node) else None
    if pair is not None and all(isinstance(one, fx.Node) for one in pair):
        yield from (pair, pair[::-1])


def _turns(node: Any, x: fx.Node) -> bool:
    """Whether it is rotate_half(x): the second half negated, then the first."""
    tensors = argument(node, "tensors") if is_op(node, "cat") else None
    if tensors is None or not _is_last(node, argument(node, "dim", 0)) or len(tensors) != 2:
        return False
    negated, first = tensors
    size = _shape(x)[-1]
    if not is_op(negated, "neg", "negative") or not isinstance(size, int) or size % 2:
        return False
    return _part(first, x) == (0, size // 2) and _part(negated.args[0], x) == (size // 2, size)


def _part(node: Any, x: fx.Node) -> tuple[int, int] | None:
    """From where to where a slice of x's last dimension goes."""
    if not is_op(node, "getitem") or node.args[0] is not x:
        return None
    index = node.args[1]
    if not isinstance(index, tuple) or index[:-1] not in ((Ellipsis,), (slice(None),) * (len(_shape(x)) - 1)):
        return None
    last = index[-1]
    if not isinstance(last, slice):
        return None
    size, (start, stop, step) = _shape(x)[-1], (last.start, last.stop, last.step)
    start, stop = start or 0, size if stop is None else stop
    if step not in (None, 1) or not all(isinstance(one, int) for one in (start, stop, size)):
        return None
    return (start, stop) if 0 <= start <= stop <= size else None


def _are_angles(node: fx.Node, x: fx.Node) -> bool:
    """Whether it broadcasts to x, and is the same for all its heads."""
    shape, whole = shape_of(node), _shape(x)
    if shape is None or len(shape) not in (2, 3, 4) or len(whole) != 4:
        return False
    *before, length, size = shape
    if not same_size(length, whole[2]) or not same_size(size, whole[3]):
        return False
    batch = before[0] if len(before) == 2 else 1
    return (not before or same_size(before[-1], 1)) and (same_size(batch, 1) or same_size(batch, whole[0]))


def _with_conversions(node: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What is converted to a wider dtype before and back behind it, with that."""
    user = only_user(node)
    source = x.args[0] if is_op(x, *CONVERSIONS) else x
    if user is None or not is_op(user, *CONVERSIONS) or not isinstance(source, fx.Node):
        return node, x
    narrow, wide = fake(source), fake(node)
    if not isinstance(narrow, torch.Tensor) or narrow.dtype != dtype_of(user) or narrow.itemsize > wide.itemsize:
        return node, x
    return user, source


def _with_the_rest(node: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The whole head, where its first elements alone turn."""
    user = only_user(node)
    tensors: Any = argument(user, "tensors") if user is not None and is_op(user, "cat") else ()
    if user is None or len(tensors) != 2 or tensors[0] is not node or not is_op(x, "getitem"):
        return node, x
    whole = x.args[0]
    assert isinstance(whole, fx.Node)
    size, turned = _shape(whole)[-1:], _shape(x)[-1]
    if not _is_last(user, argument(user, "dim", 0)) or rank_of(whole) != 4 or not isinstance(size[0], int):
        return node, x
    if _part(x, whole) != (0, turned) or _part(tensors[1], whole) != (turned, size[0]):
        return node, x
    return user, whole


def _is_last(node: fx.Node, dim: Any) -> bool:
    rank = rank_of(node)
    return rank is not None and isinstance(dim, int) and dim % rank == rank - 1


def _batch(graph: fx.Graph, x: fx.Node) -> Any:
    """How many sequences x has, not by x itself: that would keep it in a graph that goes without it."""
    size = _shape(x)[0]
    if isinstance(size, int):
        return size
    return next((node for node in graph.nodes if node.op == "placeholder" and same_size(fake(node), size)), None)


def _fake_angles(cos: fx.Node, x: fx.Node) -> Any:
    batch, _, length, _ = _shape(x)
    wide = torch.promote_types(fake(cos).dtype, torch.float32)
    return fake(x).new_empty(batch, length, 2 * _shape(cos)[-1], dtype=wide)


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return shape_of(node) or ()
