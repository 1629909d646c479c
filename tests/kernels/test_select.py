"""The borders of a row's largest values, searched for, against sorting; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from paceline.kernels import select
from paceline.kernels.select import (
    LEAST_ROWS,
    kth_largest,
    kth_largest_ref,
    mass_border,
    mass_border_ref,
    select_refusal,
)

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them

INF = float("inf")


def rows_of(device: str, width: int, *, coarse: bool = False) -> torch.Tensor:
    """Rows of several spreads, some with equals, zeros of both signs, infinities and the smallest numbers."""
    values = torch.randn(9, width, generator=torch.Generator().manual_seed(width)) * torch.logspace(-3, 2, 9)[:, None]
    if coarse:
        values = values.bfloat16().float()
    values[1, ::2] = -INF
    values[2] = 0.0
    values[2, ::3] = -0.0
    values[3] = -7.5
    values[4] *= 1e-38
    values[5, 0] = INF
    return values.to(device)


# The interpreter takes 0.5 s a search: each row asks for something else.
@pytest.mark.parametrize(("width", "coarse"), [(1, False), (50, True), (4097, False)])
def test_kth_largest(triton_device, width, coarse):
    values = rows_of(triton_device, width, coarse=coarse)
    ks = torch.tensor([1, 3, 2, 50, 7, 1, 49, 25, 10], device=triton_device).clamp(max=width)
    expected = kth_largest_ref(values, ks).masked_fill(ks == width, -INF)
    assert torch.equal(kth_largest(values, ks), expected)


@pytest.mark.parametrize(("width", "coarse"), [(7, False), (50, True), (4097, False)])
def test_mass_border(triton_device, width, coarse):
    values = rows_of(triton_device, width, coarse=coarse)
    values[5, 0] = 3.0
    weights = values.softmax(dim=1)
    masses = [0.1, 0.5, 0.93, 0.999, 1e-9, 0.3, 0.9, 0.8, 0.99]
    masses = torch.tensor(masses, dtype=torch.float64, device=triton_device)
    assert torch.equal(mass_border(values, weights, masses), mass_border_ref(values, weights, masses))


def test_a_mass_that_is_not_there_keeps_everything(triton_device):
    values = rows_of(triton_device, 40)[6:]
    weights = values.softmax(dim=1) * 0.5
    masses = torch.tensor([0.75, 2.0, 1.0], dtype=torch.float64, device=triton_device)
    assert (mass_border(values, weights, masses) == -INF).all()


def test_rows_with_a_nan_end_and_are_a_number(triton_device):
    values = torch.randn(4, 30, device=triton_device)
    values[::2, 3] = torch.nan
    ks = torch.full((4,), 2, device=triton_device)
    found = kth_largest(values, ks)
    assert not found.isnan().any()
    assert torch.equal(found[1::2], kth_largest_ref(values, ks)[1::2])


def test_what_is_left_to_a_sort(monkeypatch, triton_device):
    monkeypatch.setattr(select, "triton_refusal", lambda device, dtype: None)
    assert "sorted sooner" in (select_refusal(torch.zeros(LEAST_ROWS - 1, 9, device=triton_device)) or "")
    assert "dtype" in (select_refusal(torch.zeros(16, 9, dtype=torch.float64, device=triton_device)) or "")
    assert "gaps" in (select_refusal(torch.zeros(16, 18, device=triton_device)[:, ::2]) or "")
    assert select_refusal(torch.zeros(LEAST_ROWS, 9, device=triton_device)) is None
