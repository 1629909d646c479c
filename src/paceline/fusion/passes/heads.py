"""Attention with the splitting of its heads before it and their joining behind it becomes one node over
[batch, tokens, heads * head_dim]. What is left between such nodes has tokens in front and channels behind, so that
padding can go (passes/padding.py) and a kernel may read queries, keys and values where their projection wrote them."""

from __future__ import annotations

from typing import Any

from torch import fx

from paceline.fusion.graph import (
    argument,
    call,
    fake,
    is_op,
    only_user,
    rank_of,
    replace,
    same_shape,
    same_size,
    shape_of,
)
from paceline.fusion.heads import Heads, attend
from paceline.fusion.rewrite import Rewrite

VIEWS = ("view", "reshape")


def apply(rewrite: Rewrite) -> None:
    for node in list(rewrite.graph.nodes):
        if is_op(node, "sdpa") and argument(node, "dropout_p", 0.0) == 0:
            _take_heads(rewrite, node)


def _take_heads(rewrite: Rewrite, node: fx.Node) -> None:
    split = [_split(argument(node, name)) for name in ("query", "key", "value")]
    last = _joined(node)
    if last is None or any(part is None for part in split):
        rewrite.leave("attention: its heads are not split and joined by views alone")
        return
    (q, heads), (k, kv_heads), (v, _) = split  # type: ignore[misc]
    if not rewrite.is_free(node, last, q, k, v):
        return
    form = Heads(heads, kv_heads, argument(node, "scale"), argument(node, "is_causal", False))
    args = (q, k, v, argument(node, "attn_mask"), form)
    replace(last, call(rewrite.graph, last, attend, args, fake(last)))
    rewrite.count("heads taken along")


def _split(node: Any) -> tuple[fx.Node, int] | None:
    """[B, S, C] and the number of heads behind [B, H, S, D]."""
    node = _behind_copies(node)
    if not _swaps(node):
        return None
    apart = _behind_copies(node.args[0])
    if not is_op(apart, *VIEWS, "unflatten") or rank_of(apart.args[0]) != 3 or rank_of(apart) != 4:
        return None
    source: fx.Node = apart.args[0]
    shape, whole = shape_of(apart), shape_of(source)
    assert shape is not None
    assert whole is not None
    if not same_size(shape[0], whole[0]) or not same_size(shape[1], whole[1]) or not isinstance(shape[2], int):
        return None
    return source, shape[2]


def _joined(node: fx.Node) -> fx.Node | None:
    """The [B, S, C] that [B, H, S, D] is joined to, with nothing else made of it."""
    shape = shape_of(node)
    turned = _follow(node)
    if turned is None or not _swaps(turned) or shape is None or len(shape) != 4:
        return None
    joined = _follow(turned)
    if joined is None or not is_op(joined, *VIEWS, "flatten") or rank_of(joined) != 3:
        return None
    found = shape_of(joined)
    assert found is not None
    if not same_size(found[0], shape[0]) or not same_size(found[1], shape[2]):
        return None
    while (user := only_user(joined)) is not None and is_op(user, "contiguous"):
        joined = user  # what attend() returns is
    return joined


def _behind_copies(node: Any) -> Any:
    while is_op(node, "contiguous") or (is_op(node, *VIEWS) and same_shape(node, node.args[0])):
        node = node.args[0]
    return node


def _follow(node: fx.Node) -> fx.Node | None:
    """The one user, past copies and views that change no shape."""
    user = only_user(node)
    while user is not None and (is_op(user, "contiguous") or (is_op(user, *VIEWS) and same_shape(user, user.args[0]))):
        user = only_user(user)
    return user


def _swaps(node: Any) -> bool:
    """Whether it exchanges dimensions 1 and 2 of four."""
    if rank_of(node) != 4:
        return False
    if is_op(node, "transpose"):
        return {argument(node, "dim0") % 4, argument(node, "dim1") % 4} == {1, 2}
    if is_op(node, "permute"):
        dims = node.args[1:] if isinstance(node.args[1], int) else node.args[1]
        return tuple(dim % 4 for dim in dims) == (0, 2, 1, 3)
    return False
