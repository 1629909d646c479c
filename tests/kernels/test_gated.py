"""The gated activation's kernel against its plain twin: in Triton's interpreter on a CPU, else on the GPU."""

from __future__ import annotations

import pytest
import torch

from paceline.kernels.activation import ACTIVATIONS, gated, gated_ref
from paceline.kernels.gated import gated_refusal, gated_rows

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them
# The interpreter cuts bfloat16 off where the GPU rounds.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(("rows", "channels"), [(1, 1), (3, 37), (2, 2049)])
def test_errs_no_more_than_twice_plain_torch(triton_device, dtype, activation, rows, channels):
    torch.manual_seed(0)
    x = torch.randn(rows, 2 * channels).to(triton_device, dtype)
    exact = gated_ref(x.double(), activation)
    found = gated_rows(x, activation)
    assert found.dtype == dtype
    assert (found - exact).norm() <= 2 * (gated(x, activation) - exact).norm() + 1e-6 * exact.norm()


def test_rows_lie_a_stride_apart_and_none_are_none(triton_device):
    wide = torch.randn(4, 90, device=triton_device)
    torch.testing.assert_close(gated_rows(wide[:, 20:60], "silu"), gated(wide[:, 20:60], "silu"))
    assert gated_rows(wide[:0, 20:60], "silu").shape == (0, 20)


def test_refusals():
    assert gated_refusal(torch.zeros(1, 8)) == "device is cpu"
    assert gated_refusal(torch.zeros(1, 8, dtype=torch.float64)) == "dtype is torch.float64"
    assert gated_refusal(torch.zeros(8, 2).T) == "they are no matrix of whole rows"
