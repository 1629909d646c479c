"""On a CPU, attention whose queries, keys and values are the thirds of one product takes that product whole: they are
three views of it, and padding is put into and taken out of one tensor."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from paceline.fusion.cpu_heads import attend_joined
from paceline.fusion.graph import call, fake, replace
from paceline.fusion.heads import attend
from paceline.fusion.rewrite import Rewrite


def apply(rewrite: Rewrite) -> None:
    for node in list(rewrite.graph.nodes):
        if node.target is not attend:
            continue
        q, k, v, mask, heads = node.args
        query, joined = fake(q), _thirds(q, k, v)
        if joined is None or not isinstance(query, torch.Tensor) or query.device.type != "cpu":
            continue
        if not rewrite.is_free(node, joined, q, k, v):
            continue
        replace(node, call(rewrite.graph, node, attend_joined, (joined, mask, heads), fake(node)))
        rewrite.count("thirds of one product")


def _thirds(*parts: Any) -> fx.Node | None:
    """The tensor of which these are the first, second and last third along its last dimension."""
    splits: set[Any] = {part.args[0] for part in parts if isinstance(part, fx.Node) and part.target is operator.getitem}
    split = splits.pop() if len(splits) == 1 else None
    if split is None or split.target is not torch.split or [part.args[1:] for part in parts] != [(0,), (1,), (2,)]:
        return None
    joined, sizes, dim = split.args
    return joined if dim == -1 and len(sizes) == 3 and len(set(sizes)) == 1 else None
