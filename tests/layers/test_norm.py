"""A norm of what it adds itself, in Triton's interpreter where there is no GPU, against the norm of a sum."""

from __future__ import annotations

import pytest
import torch

from paceline.config import NormConfig
from paceline.kernels.scaled_linear import quantize_rows
from paceline.layers import norm as module
from paceline.layers.norm import Norm, Unadded

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them
# The interpreter cuts bfloat16 off where the GPU rounds.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16


@pytest.fixture
def kernels(triton_device, monkeypatch):
    """The device where norms are the kernels'."""
    monkeypatch.setattr("paceline.kernels.norm.triton_refusal", lambda device, dtype: None)
    return triton_device


def make(kind: str, device: str) -> tuple[Norm, Unadded]:
    torch.manual_seed(0)
    weight, bias = (torch.randn(96) / 4 + 1).to(device, DTYPE), torch.randn(96).to(device, DTYPE)
    norm = Norm(NormConfig(kind=kind, eps=1e-5, bias=True), weight, bias)
    return norm, Unadded(*((torch.randn(5, 96) * scale).to(device, DTYPE) for scale in (30, 1)))


def copied(x: Unadded) -> Unadded:
    return Unadded(x.x_TC.clone(), x.half_TC.clone())


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_one_kernel_adds_and_norms_where_the_terms_lay(kernels, kind):
    norm, x = make(kind, kernels)
    sum_TC = x.added()
    normed_TC, scaled = norm(sum_TC), norm.scaled(sum_TC)
    assert torch.equal(norm(copied(x)), normed_TC)

    given = copied(x)
    found, added_TC = norm.scaled_of_sum(given)
    assert torch.equal(found.q_TK.view(torch.uint8), scaled.q_TK.view(torch.uint8))
    assert torch.equal(found.scale_T1, scaled.scale_T1)
    assert torch.equal(added_TC, sum_TC)
    assert added_TC is given.x_TC

    given = copied(x)
    found_TC, added_TC = norm.of_sum(given)
    assert torch.equal(found_TC, normed_TC)
    assert torch.equal(added_TC, sum_TC)
    assert added_TC is given.x_TC
    assert found_TC is given.half_TC


@pytest.mark.parametrize("refused", ["x_TC", "half_TC"])
def test_where_the_kernel_cannot_torch_adds(triton_device, monkeypatch, refused):
    """And what was given stays."""
    norm, x = make("rms", triton_device)
    monkeypatch.setattr(module, "in_place_refusal", lambda rows: "these" if rows is getattr(x, refused) else None)
    before, sum_TC = copied(x), x.added()
    normed_TC, expected = norm(sum_TC), quantize_rows(norm(sum_TC))
    found_TC, added_TC = norm.of_sum(x)
    scaled, added_too_TC = norm.scaled_of_sum(x)
    assert torch.equal(found_TC, normed_TC)
    assert torch.equal(norm(x), normed_TC)
    assert torch.equal(scaled.q_TK.view(torch.uint8), expected.q_TK.view(torch.uint8))
    assert torch.equal(added_TC, sum_TC)
    assert torch.equal(added_too_TC, sum_TC)
    assert torch.equal(x.x_TC, before.x_TC)
    assert torch.equal(x.half_TC, before.half_TC)
