"""Norm, rotary embedding and cache write in one kernel, against the functions it stands for."""

from __future__ import annotations

import pytest
import torch

from paceline.inputs import KVLayer
from paceline.kernels.kv_write import write_kv_ref
from paceline.kernels.norm import layer_norm_ref, rms_norm_ref
from paceline.kernels.rotary import apply_rotary_ref

pytest.importorskip("triton")
from paceline.kernels.rope_kv import QKNorm, rope_and_write_kv, rope_refusal


def angles(tokens, rotated, device, dtype=torch.float32):
    turn = torch.rand(tokens, rotated // 2, device=device) * 6
    cos, sin = torch.cat((turn.cos(), turn.cos()), -1), torch.cat((-turn.sin(), turn.sin()), -1)
    return cos.to(dtype), sin.to(dtype)


def caches(kv_heads, dim, device, dtype=torch.float32):
    return [KVLayer(*torch.full((2, kv_heads, 24, dim), 7.0, device=device, dtype=dtype), 0) for _ in range(2)]


def by_steps(qkv, rotary, kv, slots, norm, heads):
    """The twins one after the other, each in float32."""
    kv_heads = kv.k_HSD.shape[0]
    q, k, v = qkv.float().split((heads, kv_heads, kv_heads), 1)
    if norm is not None:
        together = norm.q_weight.numel() != qkv.shape[-1]

        def normed(x, weight):
            flat = x.flatten(1) if together else x
            if norm.kind == "layer":
                return layer_norm_ref(flat, weight.float(), None, norm.eps).view(x.shape)
            return rms_norm_ref(flat, weight.float(), norm.eps).view(x.shape)

        q, k = normed(q, norm.q_weight), normed(k, norm.k_weight)
    if rotary is not None:
        q, k = (apply_rotary_ref(x, rotary[0].float(), rotary[1].float()) for x in (q, k))
    write_kv_ref(k, v, kv, slots)
    return q.to(qkv.dtype)


def norms(kind, scope, heads, kv_heads, dim, device):
    if kind is None:
        return None
    size = (dim, dim) if scope == "head" else (heads * dim, kv_heads * dim)
    return QKNorm(kind, 0.01, torch.randn(size[0], device=device), torch.randn(size[1], device=device))


def assert_equal(qkv, rotary, norm, *, heads, kv_heads, tokens):
    slots = torch.randperm(24, device=qkv.device)[:tokens]
    fast, plain = caches(kv_heads, qkv.shape[-1], qkv.device, qkv.dtype)
    found = rope_and_write_kv(qkv, rotary, fast, slots, norm)
    expected = by_steps(qkv, rotary, plain, slots, norm, heads)
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if qkv.dtype == torch.float32 else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(fast.k_HSD, plain.k_HSD, **tolerance)
    torch.testing.assert_close(fast.v_HSD, plain.v_HSD, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "scope"),
    [(None, None), ("rms", "head"), ("rms", "projection"), ("layer", "head"), ("layer", "projection")],
)
@pytest.mark.parametrize("rotated", [0, 6, 12])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1)])
@pytest.mark.parametrize("tokens", [3, 20])
def test_equals_the_steps(triton_device, kind, scope, rotated, heads, kv_heads, tokens):
    """Heads of 12: no power of two, turned wholly, in part or not at all. 20 tokens are a tile and a part of one."""
    qkv = torch.randn(tokens, heads + 2 * kv_heads, 12, device=triton_device) + 1
    rotary = angles(tokens, rotated, triton_device) if rotated else None
    norm = norms(kind, scope, heads, kv_heads, 12, triton_device)
    assert_equal(qkv, rotary, norm, heads=heads, kv_heads=kv_heads, tokens=tokens)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_float16_rounds_once(triton_device, tokens):
    qkv = torch.randn(tokens, 8, 64, device=triton_device).half()
    norm = norms("rms", "head", 4, 2, 64, triton_device)
    assert_equal(qkv, angles(tokens, 64, triton_device, torch.float16), norm, heads=4, kv_heads=2, tokens=tokens)


def test_rows_of_a_wider_tensor(triton_device):
    qkv = torch.randn(3, 10, 16, device=triton_device)[:, 1:9]
    assert_equal(qkv, angles(3, 16, triton_device), None, heads=4, kv_heads=2, tokens=3)


@pytest.mark.parametrize("tokens", [3, 20])
def test_a_negative_slot_writes_nothing(triton_device, tokens):
    """An unused row of a captured step: every slot but that of the used row keeps its 7."""
    qkv = torch.randn(tokens, 8, 16, device=triton_device)
    kv, _ = caches(2, 16, triton_device)
    rope_and_write_kv(qkv, None, kv, torch.tensor([-1, 5] + (tokens - 2) * [-1], device=triton_device))
    torch.testing.assert_close(kv.k_HSD[:, 5], qkv[1, 4:6])
    others = [slot for slot in range(24) if slot != 5]
    assert (kv.k_HSD[:, others] == 7).all()
    assert (kv.v_HSD[:, others] == 7).all()


def test_refusals_say_why():
    assert rope_refusal(torch.float32, torch.device("cpu")) == "device is cpu"
    assert rope_refusal(torch.float64, torch.device("cuda")) == "dtype is torch.float64"
