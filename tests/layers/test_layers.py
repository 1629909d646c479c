"""What the small layers promise beyond the kernels they call. The whole of them is compared in tests/oracle."""

from __future__ import annotations

import pytest
import torch

from paceline import formats
from paceline.config import NormConfig
from paceline.layers.embedding import Embedding
from paceline.layers.linear import Linear
from paceline.layers.mlp import GatedMLP, PlainMLP
from paceline.layers.norm import Norm


def linear(values_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> Linear:
    return Linear(formats.pack(values_NK, "dense", dtype=values_NK.dtype, device="cpu"), bias_N)


@pytest.mark.parametrize("rows", [1, 5])
def test_linear_adds_its_bias(rows):
    x, weight, bias = torch.randn(rows, 32), torch.randn(48, 32), torch.randn(48)
    assert torch.allclose(linear(weight, bias)(x), x @ weight.T + bias, atol=1e-4)
    assert torch.allclose(linear(weight)(x), x @ weight.T, atol=1e-4)


def test_unit_offset_adds_one_to_a_norms_weight():
    x, weight = torch.randn(3, 16), torch.randn(16)
    offset = Norm(NormConfig(1e-6, unit_offset=True), weight)
    assert torch.equal(offset(x), Norm(NormConfig(1e-6), weight + 1)(x))
    assert not torch.allclose(offset(x), Norm(NormConfig(1e-6), weight)(x))


def test_a_layer_norm_centres_and_adds_its_bias():
    x, weight, bias = torch.randn(3, 16) + 4, torch.randn(16), torch.randn(16)
    found = Norm(NormConfig(0.5, kind="layer", bias=True), weight, bias)(x)
    centred = x - x.mean(dim=-1, keepdim=True)
    expected = centred / (centred.square().mean(dim=-1, keepdim=True) + 0.5).sqrt() * weight + bias
    assert torch.allclose(found, expected, atol=1e-5)
    without = Norm(NormConfig(0.5, kind="layer"), weight)(x)
    assert torch.allclose(without, expected - bias, atol=1e-5)


def test_embedding_scale_is_rounded_to_the_models_dtype():
    table = torch.eye(4)
    assert Embedding(table, 3072**0.5)(torch.tensor([2]))[0, 2].item() == pytest.approx(55.4256, abs=1e-4)
    assert Embedding(table.bfloat16(), 3072**0.5).scale == 55.5


def test_embedding_rows_follow_the_tokens():
    table = torch.randn(10, 4)
    assert torch.equal(Embedding(table)(torch.tensor([7, 0, 7])), table[[7, 0, 7]])


def test_mlp_gates_with_the_first_half():
    x, gate, up, down = torch.randn(3, 32), torch.randn(48, 32), torch.randn(48, 32), torch.randn(32, 48)
    found = GatedMLP("silu", linear(torch.cat((gate, up))), linear(down))(x)
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_plain_mlp_has_no_gate(activation):
    x, up, down = torch.randn(3, 32), torch.randn(48, 32) / 6, torch.randn(32, 48) / 7
    bias_up, bias_down = torch.randn(48), torch.randn(32)
    found = PlainMLP(activation, linear(up, bias_up), linear(down, bias_down))(x)
    expected = getattr(torch.nn.functional, activation)(x @ up.T + bias_up) @ down.T + bias_down
    assert torch.allclose(found, expected, atol=1e-4)
