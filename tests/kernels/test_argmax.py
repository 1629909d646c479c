"""The argmax of two launches against torch's; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from paceline.kernels.argmax import LARGEST, argmax, argmax_ref, argmax_refusal

pytest.importorskip("triton")

NAN, INF = float("nan"), float("inf")


def assert_equal(logits):
    ids, values = argmax(logits)
    expected_ids, expected_values = argmax_ref(logits)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [1, 7, 2048, 2049, 5000])
@pytest.mark.parametrize("rows", [1, 3])
def test_equals_torch(triton_device, rows, size):
    assert_equal(torch.randn(rows, size, device=triton_device))


def test_of_equals_the_first_wins(triton_device):
    """bfloat16 logits tie often; 2,048 is where the second part begins."""
    logits = torch.randn(8, 4096, device=triton_device).bfloat16().float().clamp(max=1)
    assert_equal(logits)
    assert_equal(torch.tensor([[-1.0, -0.0, 0.0], [-2.0, -1.0, -1.0]], device=triton_device))


def test_not_finite(triton_device):
    logits = torch.randn(8, 3000, device=triton_device)
    logits[0, 2500] = NAN
    logits[1, 7], logits[1, 2900] = INF, NAN
    logits[2, 2100] = INF
    logits[3] = -INF
    logits[4] = NAN
    logits[5, :2999] = -INF
    logits[6, 5] = -torch.tensor(NAN)
    logits[7] = -1e-40
    assert_equal(logits)
    assert argmax(logits)[1].isfinite().tolist() == [False, False, False, False, False, True, False, True]


def test_writes_where_it_is_told(triton_device):
    wide = torch.randn(4, 100, device=triton_device)
    ids, values = torch.zeros(4, dtype=torch.int64, device=triton_device), torch.zeros(4, device=triton_device)
    argmax(wide[1:3, 10:60], (ids[1:3], values[1:3]))
    assert ids[1:3].tolist() == wide[1:3, 10:60].argmax(1).tolist()
    assert values.tolist() == [0.0, *wide[1:3, 10:60].amax(1).tolist(), 0.0]


def test_nothing_to_do(triton_device):
    ids, values = argmax(torch.empty(0, 5, device=triton_device))
    assert (ids.shape, values.shape) == ((0,), (0,))


def test_refusals_say_why():
    assert argmax_refusal(torch.empty(1, 5).half()) == "dtype is torch.float16"
    assert argmax_refusal(torch.empty(1, 5)[:, ::2]) == "a row has gaps"
    assert argmax_refusal(torch.empty(1, 5)) == "device is cpu"
    too_wide = torch.empty(1, device="meta").expand(1, LARGEST + 1)
    assert argmax_refusal(too_wide).endswith(f"logits a row, and the kernel takes {LARGEST}")


@pytest.mark.gpu
def test_a_vocabulary_on_a_gpu(triton_device):
    logits = torch.randn(3, 128_256, device=triton_device)
    logits[1, 128_255] = INF
    logits[2, 100] = NAN
    assert_equal(logits)
