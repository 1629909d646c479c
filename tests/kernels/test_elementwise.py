from __future__ import annotations

import pytest
import torch

from paceline.inputs import KVLayer
from paceline.kernels.activation import ACTIVATIONS, activate, activate_ref, gated, gated_ref
from paceline.kernels.kv_write import write_kv, write_kv_ref
from paceline.kernels.norm import layer_norm, layer_norm_ref, rms_norm, rms_norm_ref
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
@pytest.mark.parametrize("width", [1, 31, 64])
@pytest.mark.parametrize("with_bias", [True, False])
def test_layer_norm(rows, width, with_bias):
    x, weight, bias = torch.randn(rows, width) * 3 + 5, torch.randn(width), torch.randn(width) if with_bias else None
    torch.testing.assert_close(
        layer_norm(x, weight, bias, 1e-2), layer_norm_ref(x, weight, bias, 1e-2), rtol=1e-4, atol=1e-5
    )


def test_layer_norm_centres_scales_and_shifts():
    """By hand: the mean of (1, 3, 5, 7) is 4 and its variance 5, so eps 4 divides by 3."""
    x, weight, bias = torch.tensor([[1.0, 3, 5, 7]]), torch.tensor([3.0, 3, 6, 3]), torch.tensor([0.0, 0, 0, 10])
    torch.testing.assert_close(layer_norm(x, weight, bias, 4.0), torch.tensor([[-3.0, -1, 2, 13]]))


@pytest.mark.parametrize("with_bias", [True, False])
def test_layer_norm_rounds_bfloat16_once(with_bias):
    """The mean of values around 100 must not be taken in bfloat16, whose step there is 0.5."""
    x = (torch.randn(5, 64) + 100).bfloat16()
    weight, bias = torch.randn(64).bfloat16(), torch.randn(64).bfloat16() if with_bias else None
    found, expected = layer_norm(x, weight, bias, 1e-5), layer_norm_ref(x, weight, bias, 1e-5)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)


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
    torch.manual_seed(rows)
    gate_up = torch.randn(rows, 22) * 2
    # Where erf is nearly -1, 1 + erf has lost what gate * up multiplies by up to 40: 2.4e-6 of it is a rounding.
    torch.testing.assert_close(gated(gate_up, activation), gated_ref(gate_up, activation), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_plain_activation(rows, activation):
    torch.manual_seed(rows)
    x = torch.randn(rows, 22) * 2
    torch.testing.assert_close(activate(x, activation), activate_ref(x, activation), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("activation", "expected"), [("silu", 0.731059), ("gelu", 0.841345), ("gelu_tanh", 0.841192), ("relu", 1.0)]
)
def test_activations_are_the_published_functions(activation, expected):
    """At 1: the logistic function, the normal distribution, its tanh approximation, 1; below 0 they are nearly 0."""
    found = activate(torch.tensor([[1.0, -20.0]]), activation)
    torch.testing.assert_close(found, torch.tensor([[expected, 0.0]]), rtol=1e-6, atol=1e-6)


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
