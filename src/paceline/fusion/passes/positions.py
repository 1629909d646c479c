"""What depends on a length alone and is the beginning of a constant is one slice of it: embeddings of positions, and of
token types that nobody passed, with what adds them up.

BERT's embeddings are then a look-up, a sum and a norm; it was three look-ups, a gather and two sums, which for one text
of 16 tokens on a CPU take 100 us of 2.5 ms.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from paceline.fusion.graph import argument, call, constant, fake, is_op, operands, replace, same_shape, weight_of
from paceline.fusion.passes.constants import MOST_BYTES
from paceline.fusion.rewrite import Rewrite


@dataclass(frozen=True)
class _Beginning:
    """`whole`[:, :length] of [1, longest, ...], broadcast over a batch or not. `made_of`: the weights in it."""

    whole: torch.Tensor
    length: Any
    made_of: tuple[torch.Tensor, ...]


def apply(rewrite: Rewrite) -> None:
    known: dict[Any, _Beginning] = {}
    for node in list(rewrite.graph.nodes):
        if not rewrite.is_free(node, *node.all_input_nodes):
            continue
        found = _beginning(rewrite, node, known)
        if found is not None:
            known[node] = found
        elif is_op(node, "add"):
            _add(rewrite, node, known)


def _beginning(rewrite: Rewrite, node: Any, known: dict[Any, _Beginning]) -> _Beginning | None:
    """Of a node that has one."""
    if is_op(node, "getitem"):
        whole = weight_of(rewrite.module, argument(node, "input"))
        length = _length(argument(node, "index"))
        if whole is None or whole.dim() != 2 or whole.shape[0] != 1 or length is None:
            return None
        return _Beginning(whole, length, (whole,))
    if is_op(node, "expand") and node.args[0] in known:
        source, sizes = known[node.args[0]], node.args[1:]
        return source if len(sizes) == 2 and sizes[-1] is source.length else None
    if is_op(node, "gather"):
        table, places = weight_of(rewrite.module, argument(node, "input")), known.get(argument(node, "index"))
        if table is None or places is None or argument(node, "dim") != 1 or table.shape[0] != 1:
            return None
        return _made(places, torch.gather, (table, 1, places.whole), table)
    if is_op(node, "embedding"):
        table, places = weight_of(rewrite.module, argument(node, "weight")), known.get(argument(node, "input"))
        if table is None or places is None or argument(node, "max_norm") is not None:
            return None
        if places.whole.numel() * table.shape[1] * table.itemsize > MOST_BYTES + table.nbytes:
            return None
        return _made(places, F.embedding, (places.whole, table), table)
    return None


def _length(index: Any) -> fx.Node | None:
    """The n of [:, :n]."""
    if not isinstance(index, tuple) or len(index) != 2 or index[0] != slice(None) or not isinstance(index[1], slice):
        return None
    places = index[1]
    return places.stop if isinstance(places.stop, fx.Node) and not places.start and places.step is None else None


def _made(
    places: _Beginning, look_up: Callable[..., torch.Tensor], args: tuple[Any, ...], table: torch.Tensor
) -> _Beginning | None:
    try:
        whole = look_up(*args).detach()
    except (IndexError, RuntimeError):  # the table has fewer rows than there are positions: calls may need no more
        return None
    return _Beginning(whole, places.length, (*places.made_of, table))


def _add(rewrite: Rewrite, node: fx.Node, known: dict[Any, _Beginning]) -> None:
    """x + beginning; where x is such a sum itself, the beginnings are added up once."""
    pair = operands(node, "add")
    if pair is None:
        return
    for x, other in (pair, pair[::-1]):
        added = known.get(other)
        if added is None or not isinstance(x, fx.Node) or x in known or not same_shape(x, node):
            continue
        if is_op(x, "add") and (below := x.meta.get("beginning")) is not None:
            x, earlier = below
            if earlier.length is added.length and earlier.whole.shape == added.whole.shape:
                total = earlier.whole + added.whole
                added = _Beginning(total, added.length, (*earlier.made_of, *added.made_of))
            else:
                return
        index = (slice(None), slice(None, added.length))
        table = constant(rewrite.module, added.whole, "positions", node)
        part = call(rewrite.graph, node, operator.getitem, (table, index), None)
        new = call(rewrite.graph, node, torch.add, (x, part), fake(node))
        new.meta["beginning"] = x, added
        replace(node, new)
        rewrite.copied.extend(added.made_of)
        rewrite.count("beginning of a constant")
        return
