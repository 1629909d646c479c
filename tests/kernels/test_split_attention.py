"""Attention of a few queries over split keys against its twin, on a GPU or in Triton's interpreter.

Importing the kernel is each test's business, since Triton is optional: the fixture `triton_device` comes first.
"""

from __future__ import annotations

import pytest
import torch

from paceline.kernels import split_attention as module
from paceline.kernels.flash_attention import flash_attention_ref
from paceline.kernels.gpu import GPU
from paceline.kernels.split_attention import MOST_ROWS, rows_refusal, split_attention, splitting_pays

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def inputs(B, S, L, H, D, device, *, kv_heads=None):
    kv_heads = kv_heads or H
    shapes = (B, S, H, D), (B, L, kv_heads, D), (B, L, kv_heads, D)
    return [torch.randn(shape).to(device) for shape in shapes]


def check(q, k, v, **options):
    splits = options.pop("splits", None)
    options.setdefault("scale", q.shape[-1] ** -0.5)
    found = split_attention(q, k, v, splits=splits, **options)
    torch.testing.assert_close(found, flash_attention_ref(q, k, v, **options), rtol=2e-5, atol=5e-6)
    return found


@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize(
    ("B", "S", "L", "H", "kv_heads", "D"),
    [(1, 1, 300, 2, 2, 64), (2, 3, 61, 2, 2, 20), (1, 4, 130, 4, 2, 16), (2, 1, 5, 6, 2, 8), (1, 8, 40, 1, 1, 32)],
)
def test_it_is_its_twin(triton_device, splits, B, S, L, H, kv_heads, D):
    check(*inputs(B, S, L, H, D, triton_device, kv_heads=kv_heads), splits=splits)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("kind", ["mask of keys", "hides", "added", "a head's"])
def test_masks_and_biases(triton_device, splits, kind):
    """The last sequence sees no key, and gets zeros."""
    B, S, L, H = 3, 2, 70, 2
    q, k, v = inputs(B, S, L, H, 64, triton_device)
    mask = torch.rand(B, L) < 0.5
    mask[-1] = False
    bias = torch.randn(B, 1, S, L)
    options = {
        "mask of keys": {"mask_BL": mask},
        "hides": {"bias_BHSL": mask[:, None, None]},
        "added": {"bias_BHSL": bias.masked_fill(~mask[:, None, None], -torch.inf)},
        "a head's": {"bias_BHSL": torch.randn(1, H, 1, L), "mask_BL": mask},
    }[kind]
    found = check(q, k, v, splits=splits, **{name: value.to(triton_device) for name, value in options.items()})
    assert not found[-1].any()


def test_the_lowest_number_as_a_bias_leaves_the_mean(triton_device):
    """As torch has it: it is the same for all keys, and hides none."""
    q, k, v = inputs(1, 1, 70, 1, 64, triton_device)
    bias = torch.full((1, 1, 1, 70), torch.finfo(torch.float32).min, device=triton_device)
    found = check(q, k, v, splits=4, bias_BHSL=bias)
    torch.testing.assert_close(found[0, 0], v[0].mean(0), rtol=1e-4, atol=1e-5)


def test_tensors_are_read_where_they_lie(triton_device):
    """Keys by heads, as caches have them, and queries that are part of a wider projection."""
    q, k, v = inputs(2, 2, 33, 2, 8, triton_device)
    k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    wide = torch.cat((q, torch.full_like(q, torch.nan)), dim=-1)
    assert check(wide[..., :8], k, v, splits=2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else []))
def test_errors_are_those_of_the_dtype(triton_device, dtype):
    q, k, v = (t.to(dtype) for t in inputs(2, 1, 90, 2, 32, triton_device))
    found = split_attention(q, k, v, scale=0.2, splits=3)
    expected = flash_attention_ref(q.double(), k.double(), v.double(), scale=0.2)
    plain = flash_attention_ref(q, k, v, scale=0.2)
    assert found.dtype == dtype
    assert (found.double() - expected).norm() <= 1.1 * (plain.double() - expected).norm()


def test_nothing_to_attend_with(triton_device):
    q, k, v = inputs(0, 1, 5, 2, 8, triton_device)
    assert split_attention(q, k, v, scale=1.0).shape == (0, 1, 2, 8)


def test_no_keys_give_zeros(triton_device):
    q, k, v = inputs(2, 1, 0, 2, 8, triton_device)
    assert not split_attention(q, k, v, scale=1.0).any()


def test_where_it_pays(monkeypatch):
    """In 16 bits the matrix unit multiplies what has several queries and heads enough."""
    monkeypatch.setattr(module, "gpu", lambda device: GPU("", 8, (9, 0)))

    def pays(B, S, dtype):
        q, k, _ = (t.to(dtype) for t in inputs(B, S, 5, 4, 8, "cpu"))
        return splitting_pays(q, k)

    assert pays(1, 4, torch.float16)
    assert not pays(2, 4, torch.float16)
    assert pays(2, 1, torch.float16)
    assert pays(2, 4, torch.float32)


def test_how_many_rows_are_a_few():
    q, k, _ = inputs(1, 2, 5, 8, 8, "cpu", kv_heads=2)
    assert rows_refusal(q, k) is None
    q, k, _ = inputs(1, MOST_ROWS + 1, 5, 1, 8, "cpu")
    assert "9 queries" in str(rows_refusal(q, k))
