"""On a GPU, attention runs by the kernel that reads queries, keys and values where their projection wrote them, and a
mask of keys as it is (kernels/flash_attention.py), and the rotary embedding before it by another, of both queries and
keys (kernels/rope_qk.py); that of few queries, whose keys lie in a cache, by the one that splits the keys
(kernels/split_attention.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from paceline.fusion.dynamo import likely_size
from paceline.fusion.few_queries import attend_few_queries
from paceline.fusion.graph import argument, fake, is_op, shape_of
from paceline.fusion.heads import attend, attend_by_kernel
from paceline.fusion.passes.distances import taken_apart
from paceline.fusion.rewrite import Rewrite
from paceline.fusion.rotary import rotate, rotate_by_kernel, rotate_heads, rotate_heads_by_kernel
from paceline.kernels import gpu
from paceline.kernels.flash_attention import ALL, LARGEST_HEAD
from paceline.kernels.split_attention import MOST_ROWS

ROTATIONS: dict[Any, Any] = {rotate: rotate_by_kernel, rotate_heads: rotate_heads_by_kernel}


def apply(rewrite: Rewrite) -> None:
    for node in rewrite.graph.nodes:
        if _is_of_few_queries(node):
            node.kwargs = {
                "attn_mask": argument(node, "attn_mask"),
                "scale": argument(node, "scale"),
                "enable_gqa": argument(node, "enable_gqa", False),
            }
            node.args = tuple(argument(node, name) for name in ("query", "key", "value"))
            node.target = attend_few_queries
            rewrite.count("attention of few queries by kernel")
            continue
        if node.target not in (attend, *ROTATIONS):
            continue
        query = fake(node.args[0])
        assert isinstance(query, torch.Tensor)
        reason = gpu.triton_refusal(query.device, query.dtype)
        if reason is not None and query.device.type == "cpu":
            continue  # passes/cpu_attention.py's
        if node.target is not attend and reason is None:
            node.target = ROTATIONS[node.target]
            rewrite.count("rotary embedding by kernel")
        if node.target is attend:
            _attend_by_kernel(rewrite, node, query, reason)


def _attend_by_kernel(rewrite: Rewrite, node: fx.Node, query: torch.Tensor, reason: str | None) -> None:
    """`reason`: why no kernel may run."""
    head_dim = query.shape[-1]
    if reason is None and not (isinstance(head_dim, int) and head_dim // node.args[4].queries <= LARGEST_HEAD):  # type: ignore[union-attr]
        reason = f"heads are larger than {LARGEST_HEAD}"
    if reason is not None:
        rewrite.leave(f"attention by torch: {reason}")
        return
    node.target = attend_by_kernel
    rewrite.count("attention by kernel")
    _ask_for_distances(rewrite, node)


def _ask_for_distances(rewrite: Rewrite, node: fx.Node) -> None:
    """Instead of reading them from a mask."""
    q, k, v, mask, heads = node.args
    found = taken_apart(rewrite, mask)
    if found is None or heads.causal or found[1] == ALL:  # type: ignore[union-attr]
        return
    of_keys, seen = found
    node.args = (q, k, v, of_keys, heads._replace(causal=seen.causal, window=seen.window))  # type: ignore[union-attr]
    rewrite.count("mask of distances")


def _is_of_few_queries(node: fx.Node) -> bool:
    if not is_op(node, "sdpa") or argument(node, "is_causal") or argument(node, "dropout_p"):
        return False
    query, mask = fake(argument(node, "query")), argument(node, "attn_mask")
    return (
        isinstance(query, torch.Tensor)
        and gpu.triton_refusal(query.device, query.dtype) is None
        and query.dim() == 4
        and (likely_size(query.shape[2]) or 0) <= MOST_ROWS
        and (mask is None or len(shape_of(mask) or ()) == 4)
    )
