from __future__ import annotations

import pytest
import torch

from paceline.inputs import KVLayer
from paceline.kernels.activation import ACTIVATIONS, gated, gated_ref
from paceline.kernels.kv_write import write_kv, write_kv_ref
from paceline.kernels.norm import rms_norm, rms_norm_ref
from paceline.kernels.rotary import apply_rotary, apply_rotary_ref

ROWS = [0, 1, 3, 17]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 31, 64])
def test_rms_norm(rows, width):
    x, weight = torch.randn(rows, width) * 3, torch.randn(width)
    torch.testing.assert_close(rms_norm(x, weight, 1e-2), rms_norm_ref(x, weight, 1e-2))


def test_rms_norm_of_strided_heads():
    qkv = torch.randn(5, 6, 16)
    heads, weight = qkv[:, 1:4], torch.randn(16)
    torch.testing.assert_close(rms_norm(heads, weight, 1e-6), rms_norm_ref(heads, weight, 1e-6))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("rotated", [8, 16])
def test_rotary(rows, rotated):
    x = torch.randn(rows, 3, 16)
    angles = torch.rand(rows, rotated // 2) * 6
    cos = torch.cat((angles.cos(), angles.cos()), -1)
    sin = torch.cat((-angles.sin(), angles.sin()), -1)
    torch.testing.assert_close(apply_rotary(x, cos, sin), apply_rotary_ref(x, cos, sin))


def test_rotary_keeps_the_length_of_a_pair():
    x, angles = torch.randn(4, 2, 8), torch.rand(4, 4) * 6
    cos = torch.cat((angles.cos(), angles.cos()), -1)
    sin = torch.cat((-angles.sin(), angles.sin()), -1)
    y = apply_rotary(x, cos, sin)
    torch.testing.assert_close(
        y[..., :4] ** 2 + y[..., 4:] ** 2, x[..., :4] ** 2 + x[..., 4:] ** 2, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gated(rows, activation):
    gate_up = torch.randn(rows, 22) * 2
    torch.testing.assert_close(gated(gate_up, activation), gated_ref(gate_up, activation), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", ROWS)
def test_write_kv(rows):
    slots = torch.randperm(24)[:rows]
    k, v = torch.randn(2, rows, 3, 8)
    fast, plain = (KVLayer(torch.zeros(3, 24, 8), torch.zeros(3, 24, 8), 0) for _ in range(2))
    write_kv(k, v, fast, slots)
    write_kv_ref(k, v, plain, slots)
    torch.testing.assert_close(fast.k_HSD, plain.k_HSD)
    torch.testing.assert_close(fast.v_HSD, plain.v_HSD)
    assert bool(plain.k_HSD.any()) == (rows > 0)
