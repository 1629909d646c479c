"""Attention with the splitting of its heads before it and their joining behind it becomes one node over
[batch, tokens, heads * head_dim], and so does what stands between: the heads' norm and rotary embedding, and keys and
values repeated for the queries that share them. What is left between such nodes has tokens in front and channels
behind, so that padding can go (passes/padding.py) and a kernel may read queries, keys and values where their projection
wrote them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
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
from paceline.fusion.rotary import HeadNorm, rotate, rotate_heads
from paceline.kernels.norm import rms_norm

VIEWS = ("view", "reshape")


@dataclass(frozen=True)
class _Part:
    """[B, H, S, D] as it comes from [B, S, C]. `piece`: what takes such tensors apart that lie side by side in it, and
    which of them this is. `norm`, `rotation`: what the heads then go through."""

    source: fx.Node
    heads: int
    piece: tuple[fx.Node, int] | None = None
    norm: fx.Node | None = None
    rotation: fx.Node | None = None


def apply(rewrite: Rewrite) -> None:
    splits: dict[fx.Node, fx.Node] = {}
    for node in list(rewrite.graph.nodes):
        if is_op(node, "sdpa") and argument(node, "dropout_p", 0.0) == 0:
            _take_heads(rewrite, node, splits)


def _take_heads(rewrite: Rewrite, node: fx.Node, splits: dict[fx.Node, fx.Node]) -> None:
    q = _part(argument(node, "query"))
    k, v = (_part(_shared(argument(node, name))) for name in ("key", "value"))
    last = _joined(node)
    if last is None or q is None or k is None or v is None:
        rewrite.leave("attention: its heads are not split and joined by views alone")
        return
    if not _are_alike(q, k) or (v.norm, v.rotation) != (None, None) or k.heads != v.heads:
        rewrite.leave("attention: its queries and keys are not normed and turned alike")
        return
    if not rewrite.is_free(node, last, q.source, k.source, v.source):
        return
    inputs = [_piece(rewrite, part, splits) for part in (q, k, v)]
    if q.rotation is not None and k.rotation is not None:
        inputs[:2] = _rotated(rewrite, (q, k), (q.rotation, k.rotation), inputs[:2])
    form = Heads(q.heads, k.heads, argument(node, "scale"), argument(node, "is_causal", False))
    replace(last, call(rewrite.graph, last, attend, (*inputs, argument(node, "attn_mask"), form), fake(last)))
    rewrite.count("heads taken along")


def _shared(node: Any) -> Any:
    """Heads of keys or values, of which several queries' heads see a copy."""
    if not is_op(node, *VIEWS) or not is_op(node.args[0], "expand"):
        return node
    one: Any = node.args[0].args[0]
    every = slice(None)
    if not is_op(one, "getitem") or one.args[1] not in ((every, every, None), (every, every, None, every, every)):
        return node
    heads, copies = shape_of(one.args[0]), shape_of(node.args[0])
    shape = shape_of(node)
    if heads is None or copies is None or shape is None or (len(heads), len(copies), len(shape)) != (4, 5, 4):
        return node
    expected = heads[0], copies[1] * copies[2], *heads[2:]
    return one.args[0] if all(same_size(a, b) for a, b in zip(shape, expected, strict=True)) else node


def _part(node: Any) -> _Part | None:
    rotation = norm = None
    node = _behind_copies(node)
    if isinstance(node, fx.Node) and node.target is rotate:
        rotation, node = node, _behind_copies(node.args[0])
    if _is_norm(node):
        norm, node = node, _behind_copies(node.args[0])
    if (found := _taken_apart(node, (0, 3, 1, 4))) is not None:  # [B, H, S, D]
        return _Part(*found, norm, rotation)
    if not _swaps(node):
        return None
    node = _behind_copies(node.args[0])
    if norm is None and _is_norm(node):
        norm, node = node, _behind_copies(node.args[0])
    if (found := _taken_apart(node, (0, 1, 3, 4))) is not None:  # [B, S, H, D]
        return _Part(*found, norm, rotation)
    split = _split(node)
    return None if split is None else _Part(*split, None, norm, rotation)


def _split(apart: Any) -> tuple[fx.Node, int] | None:
    """[B, S, C] and the number of heads behind [B, S, H, D]."""
    if not is_op(apart, *VIEWS, "unflatten") or rank_of(apart.args[0]) != 3 or rank_of(apart) != 4:
        return None
    source: fx.Node = apart.args[0]
    shape, whole = shape_of(apart), shape_of(source)
    assert shape is not None
    assert whole is not None
    if not same_size(shape[0], whole[0]) or not same_size(shape[1], whole[1]) or not isinstance(shape[2], int):
        return None
    return source, shape[2]


def _taken_apart(node: Any, dims: tuple[int, ...]) -> tuple[fx.Node, int, tuple[fx.Node, int]] | None:
    """The source, heads and piece of one of [B, S, N, H, D], the dimensions of which it has in this order."""
    if not is_op(node, "getitem") or not isinstance(node.args[1], int):
        return None
    index, place, moved = node.args[1], 0, node.args[0]
    if is_op(moved, "unbind"):
        place, moved = argument(moved, "dim", 0), moved.args[0]
    order = _order(moved)
    view: Any = moved if order is None else moved.args[0]
    if not is_op(view, *VIEWS) or rank_of(view) != 5 or rank_of(view.args[0]) != 3:
        return None
    left = list(order or range(5))
    if left.pop(place) != 2 or tuple(left) != dims:
        return None
    source: fx.Node = view.args[0]
    shape, whole = shape_of(view) or (), shape_of(source) or ()
    if not all(map(same_size, shape[:2], whole[:2])) or not all(isinstance(size, int) for size in shape[2:]):
        return None
    return source, shape[3], (view, index % shape[2])


def _piece(rewrite: Rewrite, part: _Part, splits: dict[fx.Node, fx.Node]) -> fx.Node:
    """The [B, S, C] of a part alone."""
    if part.piece is None:
        return part.source
    view, index = part.piece
    count, heads, size = (shape_of(view) or ())[2:]
    if part.source not in splits:
        args = part.source, [heads * size] * count, -1
        splits[part.source] = call(rewrite.graph, view, torch.split, args, None)
    value = fake(part.source)[..., index * heads * size : (index + 1) * heads * size]
    return call(rewrite.graph, view, operator.getitem, (splits[part.source], index), value)


def _are_alike(q: _Part, k: _Part) -> bool:
    """Whether queries and keys may be normed and turned together."""
    if q.rotation is None or k.rotation is None:
        return (q.rotation, k.rotation, q.norm, k.norm) == (None, None, None, None)
    if q.rotation.args[1] is not k.rotation.args[1] or (q.norm is None) != (k.norm is None):
        return False
    return q.norm is None or k.norm is None or q.norm.args[2] == k.norm.args[2]


def _rotated(
    rewrite: Rewrite, parts: tuple[_Part, _Part], rotations: tuple[fx.Node, fx.Node], inputs: list[fx.Node]
) -> list[fx.Node]:
    """Queries and keys turned, for attention and for whoever else uses them: a cache."""
    graph, place = rewrite.graph, max(rotations)
    norms = [part.norm for part in parts if part.norm is not None]
    norm = HeadNorm(norms[0].args[1], norms[1].args[1], norms[0].args[2]) if norms else None  # type: ignore[arg-type]
    heads = parts[0].heads, parts[1].heads
    both = call(graph, place, rotate_heads, (*inputs, rotations[0].args[1], heads, norm), None)
    found = []
    for index, rotation in enumerate(rotations):
        turned = call(graph, place, operator.getitem, (both, index), fake(inputs[index]))
        apart = call(graph, place, torch.unflatten, (turned, -1, (heads[index], -1)), fake(rotation).transpose(1, 2))
        back = call(graph, place, torch.transpose, (apart, 1, 2), fake(rotation))
        rotation.replace_all_uses_with(back, delete_user_cb=lambda user: user > place)
        found.append(turned)
    return found


def _is_norm(node: Any) -> bool:
    """Whether it norms each head by itself."""
    return isinstance(node, fx.Node) and node.target is rms_norm and rank_of(node) == 4


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
    return _order(node) == (0, 2, 1, 3)


def _order(node: Any) -> tuple[int, ...] | None:
    """Where each dimension of a transposed or permuted tensor comes from."""
    rank = rank_of(node)
    if rank is None:
        return None
    if is_op(node, "transpose"):
        order, (a, b) = list(range(rank)), (argument(node, name) % rank for name in ("dim0", "dim1"))
        order[a], order[b] = order[b], order[a]
        return tuple(order)
    if is_op(node, "permute"):
        dims = node.args[1:] if isinstance(node.args[1], int) else node.args[1]
        return tuple(dim % rank for dim in dims)
    return None
