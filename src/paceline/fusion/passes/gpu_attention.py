"""On a GPU, attention runs by the kernel that reads queries, keys and values where their projection wrote them, and a
mask of keys as it is (kernels/flash_attention.py)."""

from __future__ import annotations

import torch

from paceline.fusion.graph import fake
from paceline.fusion.heads import attend, attend_by_kernel
from paceline.fusion.rewrite import Rewrite
from paceline.kernels import gpu
from paceline.kernels.flash_attention import LARGEST_HEAD


def apply(rewrite: Rewrite) -> None:
    for node in rewrite.graph.nodes:
        if node.target is not attend:
            continue
        query = fake(node.args[0])
        assert isinstance(query, torch.Tensor)
        head_dim = query.shape[-1]
        reason = gpu.triton_refusal(query.device, query.dtype)
        if reason is not None and query.device.type == "cpu":
            continue  # passes/cpu_attention.py's
        if reason is None and not (isinstance(head_dim, int) and head_dim // node.args[4].queries <= LARGEST_HEAD):
            reason = f"heads are larger than {LARGEST_HEAD}"
        if reason is not None:
            rewrite.leave(f"attention by torch: {reason}")
            continue
        node.target = attend_by_kernel
        rewrite.count("attention by kernel")
