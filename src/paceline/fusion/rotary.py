"""Rotary embedding of heads: what passes/rotary.py, passes/heads.py and passes/gpu_attention.py put into graphs.
Cosines and sines are the model's own, so that it may scale its angles as it likes.

F: rotated elements of a head, the first ones; A = 2 F. Element i turns with element i + F / 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from paceline.kernels.norm import rms_norm
from paceline.kernels.rope_kv import QKNorm
from paceline.kernels.rope_qk import rope_qk
from paceline.kernels.rotary import apply_rotary


class HeadNorm(NamedTuple):
    """An RMS norm of each head of queries and of keys by itself, before they turn. Weights are [D]."""

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    eps: float


def angles(cos: torch.Tensor, sin: torch.Tensor, batch: int) -> torch.Tensor:
    """[B, S, A], in float32 at least: cosines and, as apply_rotary takes them, sines. Both are [S, F], [1, S, F] or
    [B or 1, 1, S, F]."""
    wide = torch.promote_types(cos.dtype, torch.float32)
    cos, sin = (one[:, 0].to(wide) if one.dim() == 4 else one.to(wide) for one in (cos, sin))
    first, second = sin.chunk(2, -1)
    return torch.cat((cos, -first, second), -1).expand(batch, -1, -1)


def rotate(x_BHSD: torch.Tensor, angles_BSA: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D]: the heads turned."""
    return _turned(x_BHSD.transpose(1, 2), angles_BSA).transpose(1, 2)


def rotate_by_kernel(x_BHSD: torch.Tensor, angles_BSA: torch.Tensor) -> torch.Tensor:
    """rotate() in one kernel."""
    x_BSHD = (x_BHSD if x_BHSD.stride(-1) == 1 else x_BHSD.contiguous()).transpose(1, 2)
    cos_BSF, sin_BSF = angles_BSA.chunk(2, -1)
    return rope_qk(x_BSHD, x_BSHD[:, :, :0], cos_BSF, sin_BSF)[0].transpose(1, 2)


def rotate_heads(
    q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor, heads: tuple[int, int], norm: HeadNorm | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys, [B, S, C] with angles [B, S, A] or [T, C] with angles [T, A], normed and turned: so many heads
    side by side."""
    q_heads, k_heads = (x.view(*x.shape[:-1], count, -1) for x, count in zip((q, k), heads, strict=True))
    if norm is not None:
        q_heads, k_heads = rms_norm(q_heads, norm.q_weight, norm.eps), rms_norm(k_heads, norm.k_weight, norm.eps)
    return _turned(q_heads, angles).flatten(-2), _turned(k_heads, angles).flatten(-2)


def rotate_heads_by_kernel(
    q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor, heads: tuple[int, int], norm: HeadNorm | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """rotate_heads() in one kernel."""
    q_BSC, k_BSC, angles_BSA = (x if x.dim() == 3 else x[None] for x in (q, k, angles))
    cos_BSF, sin_BSF = angles_BSA.chunk(2, -1)
    q_BSHD, k_BSKD = (x.view(*x.shape[:2], count, -1) for x, count in zip((q_BSC, k_BSC), heads, strict=True))
    by_head = None if norm is None else QKNorm("rms", norm.eps, norm.q_weight, norm.k_weight)
    q_out, k_out = rope_qk(q_BSHD, k_BSKD, cos_BSF, sin_BSF, by_head)
    return q_out.view(q.shape), k_out.view(k.shape)


def _turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """[..., H, D], computed in the angles' dtype or x's, whichever is wider."""
    wide = x.to(torch.promote_types(x.dtype, angles.dtype))
    return apply_rotary(wide, *angles.chunk(2, -1)).to(x.dtype)
