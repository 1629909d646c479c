"""Norm and rotary embedding of queries and keys in one kernel, against the functions it stands for."""

from __future__ import annotations

import pytest
import torch

from paceline.kernels.norm import layer_norm_ref, rms_norm_ref
from paceline.kernels.rotary import apply_rotary_ref

pytest.importorskip("triton")
from paceline.kernels.rope_kv import QKNorm
from paceline.kernels.rope_qk import rope_qk

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them


def make_angles(batch, tokens, rotated, device):
    """Of each sequence its own, or the same for all, as an expanded tensor has them; side by side."""
    turn = torch.rand(batch or 1, tokens, rotated // 2, device=device) * 6
    both = torch.cat((turn.cos(), turn.cos(), -turn.sin(), turn.sin()), -1)
    return (both if batch else both.expand(3, -1, -1)).chunk(2, -1)


def by_steps(x_BSHD, cos, sin, norm, weight):
    """The twins one after the other, in the angles' dtype."""
    x = x_BSHD.to(cos.dtype)
    if norm is not None:
        x = rms_norm_ref(x, weight, norm.eps) if norm.kind == "rms" else layer_norm_ref(x, weight, None, norm.eps)
    flat = apply_rotary_ref(x.flatten(0, 1), cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1]))
    return flat.view(x.shape).to(x_BSHD.dtype)


@pytest.mark.parametrize("kind", [None, "rms", "layer"])
@pytest.mark.parametrize("rotated", [6, 12])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads"), [(7, 3, 1), (17, 2, 2), (1, 4, 2)])
@pytest.mark.parametrize("own_angles", [True, False])
def test_it_is_its_twins(triton_device, kind, rotated, tokens, heads, kv_heads, own_angles):
    """Of slices of one product, whose strides are those of all three."""
    torch.manual_seed(0)
    dim, device = 12, triton_device
    qkv = torch.randn(3, tokens, (heads + 2 * kv_heads) * dim, device=device)
    q, k, _ = qkv.split((heads * dim, kv_heads * dim, kv_heads * dim), -1)
    q, k = q.unflatten(-1, (heads, dim)), k.unflatten(-1, (kv_heads, dim))
    norm = None if kind is None else QKNorm(kind, 0.01, *torch.randn(2, dim, device=device))
    cos, sin = make_angles(3 if own_angles else 0, tokens, rotated, device)
    found = rope_qk(q, k, cos, sin, norm)
    weights = (None, None) if norm is None else (norm.q_weight, norm.k_weight)
    for ours, x, weight in zip(found, (q, k), weights, strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, by_steps(x, cos, sin, norm, weight), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_rounds_once(triton_device, dtype):
    """By at most the dtype's last digit: the interpreter cuts bfloat16 off where a GPU rounds."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 5, 2, 16, device=triton_device).to(dtype)
    cos, sin = make_angles(2, 5, 16, triton_device)
    for ours, x in zip(rope_qk(q, k, cos, sin), (q, k), strict=True):
        exact = by_steps(x.double(), cos.double(), sin.double(), None, None)
        torch.testing.assert_close(ours.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_nothing_gives_nothing(triton_device):
    x = torch.ones(2, 0, 3, 8, device=triton_device)
    q, k = rope_qk(x, x[:, :, :1], *make_angles(2, 0, 8, triton_device))
    assert (q.shape, k.shape) == ((2, 0, 3, 8), (2, 0, 1, 8))
