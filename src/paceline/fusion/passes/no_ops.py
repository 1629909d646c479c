"""What changes nothing goes: dropout that is off, conversions to the dtype a tensor has, x + 0, x * 1, and the joining
of keys to a cache that is still empty."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from paceline.fusion.graph import argument, fake, is_op, name_of, replace, same_shape, tensor_and_scalar
from paceline.fusion.rewrite import Rewrite


def apply(rewrite: Rewrite) -> None:
    for node in list(rewrite.graph.nodes):
        _fill_without_expanding(rewrite, node)
        source = _same_as(node)
        if source is None or not rewrite.is_free(node, source):
            continue
        replace(node, source)
        rewrite.count("no-op")


def _fill_without_expanding(rewrite: Rewrite, node: fx.Node) -> None:
    """masked_fill broadcasts its mask by itself; expand_as(scores) would be another use of the scores."""
    mask = argument(node, "mask") if is_op(node, "masked_fill") else None
    if isinstance(mask, fx.Node) and is_op(mask, "expand", "expand_as") and rewrite.is_free(mask, mask.args[0]):
        assert isinstance(mask.args[0], fx.Node)
        node.replace_input_with(mask, mask.args[0])
        rewrite.count("no-op")


def _same_as(node: fx.Node) -> fx.Node | None:
    """The node whose value this one merely repeats."""
    if is_op(node, "dropout"):
        off = argument(node, "training", True) is False or argument(node, "p", 0.5) == 0
        return argument(node, "input") if off else None
    if is_op(node, "to", "type", "float", "half", "bfloat16", "type_as", "long", "int", "bool"):
        return _converted(node)
    if is_op(node, "cat"):
        return _joined_to_nothing(node)
    for name, neutral in (("add", 0), ("sub", 0), ("mul", 1), ("div", 1)):
        pair = tensor_and_scalar(node, name)
        if pair is not None and pair[1] == neutral and _is_tensor(pair[0]) and _same_kind(node, pair[0]):
            return pair[0]
    return None


def _converted(node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    # A copy that is asked for is one, and a layout may matter to a view behind it.
    if {"copy", "memory_format"} & node.kwargs.keys() or any(a is True for a in node.args[2:]):
        return None
    return source if isinstance(source, fx.Node) and _same_kind(node, source) else None


def _joined_to_nothing(node: fx.Node) -> fx.Node | None:
    tensors = argument(node, "tensors")
    if not isinstance(tensors, (list, tuple)):
        return None
    filled = [t for t in tensors if not (_is_tensor(t) and tuple(fake(t).shape) == (0,))]
    if len(filled) == 1 and len(tensors) > 1 and _same_kind(node, filled[0]) and same_shape(node, filled[0]):
        only: fx.Node = filled[0]
        return only
    return None


def _is_tensor(node: Any) -> bool:
    return isinstance(fake(node), torch.Tensor)


def _same_kind(node: Any, source: Any) -> bool:
    a, b = fake(node), fake(source)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.dtype == b.dtype and a.device == b.device and name_of(node) != "" and same_shape(node, source)
