"""A mask [batch, 1, queries, keys] is taken apart that a model makes of how far a query sees, in which direction, and
which keys count: the kernel knows distances without reading any, and what is left of the mask goes with the padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from paceline.fusion.graph import dtype_of, is_op, operands, same_size, shape_of
from paceline.fusion.passes.masks import ANDS, always_true, counts
from paceline.fusion.rewrite import Rewrite
from paceline.kernels.flash_attention import Keys


def taken_apart(rewrite: Rewrite, mask: Any) -> tuple[fx.Node | None, Keys] | None:
    """The mask [batch, 1, 1, keys] of which keys count, if there is one, and which of these a query sees. None where
    something else is in it."""
    shape = shape_of(mask)
    if dtype_of(mask) != torch.bool or shape is None or len(shape) != 4 or not rewrite.is_free(mask):
        return None
    of_keys, causal, windows, before = None, False, [], []
    for one in _conditions(mask):
        if always_true(one):
            continue
        if _is_of_keys(one, shape):
            if of_keys not in (None, one):
                return None
            of_keys = one
        elif _is_causal(rewrite, one, shape):
            causal = True
        elif (window := _window(rewrite, one, shape)) is not None:
            windows.append(window)
        elif (reach := _reach(rewrite, one, shape)) is not None:
            before.append(reach)
        else:
            return None
    if before and not causal:
        return None
    window = min([*windows, *before], default=None)
    return of_keys, Keys(causal=causal, window=window)


def _conditions(node: fx.Node) -> list[fx.Node]:
    """What must hold together."""
    if is_op(node, "expand"):
        return _conditions(node.args[0])  # type: ignore[arg-type]
    if is_op(node, *ANDS) and all(isinstance(one, fx.Node) for one in node.args[:2]):
        return [found for one in node.args[:2] for found in _conditions(one)]  # type: ignore[arg-type]
    return [node]


def _is_of_keys(node: fx.Node, mask: tuple[Any, ...]) -> bool:
    shape = shape_of(node)
    return shape is not None and len(shape) == 4 and all(map(same_size, shape, (mask[0], 1, 1, mask[3])))


def _is_causal(rewrite: Rewrite, node: fx.Node, mask: tuple[Any, ...]) -> bool:
    """key <= query"""
    if not is_op(node, "le", "ge"):
        return False
    pair = node.args[:2] if is_op(node, "le") else node.args[1::-1]
    return _are_places(rewrite, pair[::-1], mask)


def _window(rewrite: Rewrite, node: fx.Node, mask: tuple[Any, ...]) -> int | None:
    """The w of |query - key| <= w."""
    if not is_op(node, "le") or not is_op(node.args[0], "abs") or not isinstance(node.args[1], int):
        return None
    pair = operands(node.args[0].args[0], "sub")  # type: ignore[union-attr, arg-type]
    if pair is None or not (_are_places(rewrite, pair, mask) or _are_places(rewrite, pair[::-1], mask)):
        return None
    return node.args[1] if node.args[1] >= 0 else None


def _reach(rewrite: Rewrite, node: fx.Node, mask: tuple[Any, ...]) -> int | None:
    """The w of key > query - (w + 1)."""
    if not is_op(node, "gt") or not isinstance(node.args[1], fx.Node):
        return None
    pair = operands(node.args[1], "sub")
    if pair is None or not isinstance(pair[1], int) or pair[1] < 1:
        return None
    return pair[1] - 1 if _are_places(rewrite, (pair[0], node.args[0]), mask) else None


def _are_places(rewrite: Rewrite, pair: Any, mask: tuple[Any, ...]) -> bool:
    """Whether these are the places of queries and those of keys, both counted from 0."""
    return all(counts(rewrite, one, mask[dim], dim) for one, dim in zip(pair, (2, 3), strict=True))
