"""Embedding rows and angles of one kernel against the layers it stands for; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from paceline.config import RopeConfig
from paceline.layers.embedding import Embedding
from paceline.layers.rotary import Rotary

pytest.importorskip("triton")
from paceline.kernels.embed import Angles, embed, embed_refusal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize(("hidden", "scale"), [(24, 1.0), (1100, 33.25)])
def test_equals_the_layers(triton_device, dtype, tokens, hidden, scale):
    table = torch.randn(11, hidden, device=triton_device).to(dtype)
    ids = torch.randint(11, (tokens,), device=triton_device)
    positions = torch.randint(5000, (tokens,), device=triton_device)
    rotary = Rotary(RopeConfig(dim=12, theta=10000.0), dtype, torch.device(triton_device))
    x, (cos, sin) = embed(ids, positions, table, scale, Angles(rotary.signed_D))
    assert torch.equal(x, Embedding(table, scale)(ids))
    expected_cos, expected_sin = rotary(positions)
    assert (cos.dtype, sin.dtype) == (dtype, dtype)
    torch.testing.assert_close(cos, expected_cos, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)
    torch.testing.assert_close(sin, expected_sin, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)


def test_angles_far_out_keep_their_digits(triton_device):
    """An angle of a million radians: float32 has it to 0.03, but its cosine to 1e-7."""
    frequencies = torch.tensor([-1.0, -0.3, 1.0, 0.3], device=triton_device)
    positions = torch.tensor([1_000_000, 3, 131_071], device=triton_device)
    ids = torch.zeros(3, dtype=torch.int64, device=triton_device)
    _, (cos, sin) = embed(ids, positions, torch.zeros(1, 8, device=triton_device), 1.0, Angles(frequencies, 1.25))
    angles = (positions[:, None] * frequencies).double()
    torch.testing.assert_close(cos.double(), 1.25 * angles.cos(), rtol=0, atol=3e-7)
    torch.testing.assert_close(sin.double(), 1.25 * angles.sin(), rtol=0, atol=3e-7)


def test_no_angles_and_rows_with_gaps(triton_device):
    table = torch.randn(6, 40, device=triton_device)[:, :20]
    x, angles = embed(torch.tensor([5, 0], device=triton_device), torch.tensor([1, 2], device=triton_device), table)
    assert angles is None
    assert torch.equal(x, table[[5, 0]])


def test_refusal_says_why():
    assert embed_refusal(torch.empty(2, 2)) == "device is cpu"
