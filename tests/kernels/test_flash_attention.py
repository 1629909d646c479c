"""Attention over tensors as they lie against its twin, and that one against torch's; without a GPU in Triton's
interpreter, and so in float32 and float16.

Importing the kernel is each test's business, since Triton is optional: the fixture `triton_device` comes first.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from paceline.kernels.flash_attention import (
    FlashLaunch,
    Keys,
    choose_launch,
    flash_attention,
    flash_attention_ref,
    flash_refusal,
    flash_shape_refusal,
    packed_attention,
    packed_attention_ref,
)

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them
DTYPES = [torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
SMALL = FlashLaunch(rows_a_tile=16, keys_a_tile=16, warps=2, stages=2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def inputs(B, S, L, H, D, device, *, kv_heads=None):
    kv_heads = kv_heads or H
    shapes = (B, S, H, D), (B, L, kv_heads, D), (B, L, kv_heads, D)
    return [torch.randn(shape).to(device) for shape in shapes]


def check(q, k, v, *, launch=SMALL, **options):
    """In float32, where both are a few units in the last place of their sums."""
    options.setdefault("scale", q.shape[-1] ** -0.5)
    found = flash_attention(q, k, v, launch=launch, **options)
    torch.testing.assert_close(found, flash_attention_ref(q, k, v, **options), rtol=2e-5, atol=5e-6)
    return found


def ragged_mask(B, L, device):
    """Padding on the right, on the left and in the middle, and nothing but padding."""
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, L // 2 :] = False
    mask[1, : L // 3] = False
    mask[2, L // 3 : L // 2] = False
    mask[3] = False
    return mask.to(device)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "mask", "bias"])
def test_the_twin_is_torchs(causal, kind):
    """Where torch has a mask beside causal attention it takes their sum. Rows without a key are zeros in both."""
    q, k, v = inputs(4, 7, 7, 2, 8, "cpu")
    mask = ragged_mask(4, 7, "cpu")
    bias = torch.randn(1, 2, 7, 7) if kind == "bias" else None
    expected = bias if bias is not None else torch.zeros(4, 1, 7, 7)
    if kind == "mask":
        expected = expected.masked_fill(~mask[:, None, None], -torch.inf)
    if causal:
        expected = expected + torch.full((7, 7), -torch.inf).triu(1)
    found = flash_attention_ref(
        q, k, v, scale=0.4, keys=Keys(causal), mask_BL=mask if kind == "mask" else None, bias_BHSL=bias
    )
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=expected, scale=0.4).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    if kind == "mask":
        assert not found[3].any()


@pytest.mark.parametrize(("S", "L"), [(1, 1), (16, 16), (17, 33), (3, 64)])
@pytest.mark.parametrize("dim", [16, 24, 80])
def test_sizes(triton_device, S, L, dim):
    check(*inputs(2, S, L, 2, dim, triton_device))


def test_the_largest_heads_and_heads_that_share_keys(triton_device):
    check(*inputs(1, 18, 20, 1, 256, triton_device))
    check(*inputs(2, 18, 20, 6, 16, triton_device, kv_heads=2))


@pytest.mark.parametrize("keys", [Keys(True), Keys(True, 9), Keys(True, -5), Keys(window=6), Keys(True, 4, 20)])
@pytest.mark.parametrize("masked", [False, True])
def test_which_keys_a_query_sees(triton_device, keys, masked):
    q, k, v = inputs(4, 34, 59, 1, 16, triton_device)
    check(q, k, v, keys=keys, mask_BL=ragged_mask(4, 59, triton_device) if masked else None)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("L", [9, 70])
def test_masks(triton_device, dtype, L):
    """Of one tile and of several, which a program looks through first; a view of a wider one."""
    wide = torch.zeros(4, L + 5, dtype=dtype, device=triton_device)
    wide[:, 2 : L + 2] = ragged_mask(4, L, triton_device).to(dtype)
    found = check(*inputs(4, 2, L, 2, 16, triton_device), mask_BL=wide[:, 2 : L + 2])
    assert not found[3].any()


def test_one_mask_for_all_sequences(triton_device):
    mask = ragged_mask(4, 20, triton_device)[:1]
    check(*inputs(3, 2, 20, 1, 16, triton_device), mask_BL=mask)


def test_more_keys_than_a_mask_is_looked_through_for(triton_device, monkeypatch):
    monkeypatch.setattr("paceline.kernels.flash_attention.MOST_SCANNED", 32)
    check(*inputs(4, 20, 50, 1, 16, triton_device), mask_BL=ragged_mask(4, 50, triton_device))


@pytest.mark.parametrize("causal", [False, True])
def test_lengths_and_what_lies_behind_them(triton_device, causal):
    q, k, v = inputs(4, 20, 40, 2, 16, triton_device)
    lens = torch.tensor([40, 1, 33, 0], device=triton_device)
    expected = flash_attention_ref(q, k, v, scale=0.2, keys=Keys(causal), lens_B=lens)
    for b, length in enumerate(lens.tolist()):
        k[b, length:] = v[b, length:] = torch.nan
    found = flash_attention(q, k, v, scale=0.2, keys=Keys(causal), lens_B=lens, launch=SMALL)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("shape", [(4, 2, 17, 20), (1, 2, 17, 20), (4, 1, 1, 20), (1, 2, 1, 20), (1, 1, 17, 20)])
def test_a_bias_of_any_shape_that_broadcasts(triton_device, shape):
    q, k, v = inputs(4, 17, 20, 2, 16, triton_device)
    bias = torch.randn(*shape[:3], 23).to(triton_device)[..., 1:-2]
    check(q, k, v, bias_BHSL=bias)
    check(q[:1], k[:1], v[:1], bias_BHSL=(bias > 0)[:1], mask_BL=ragged_mask(4, 20, triton_device)[2:3])


# On its way to being a weight the lowest number becomes -inf, of which NumPy warns.
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")
def test_the_lowest_bias_hides_a_key_unless_all_have_it(triton_device):
    q, k, v = inputs(2, 5, 20, 1, 16, triton_device)
    bias = torch.zeros(2, 1, 1, 20, device=triton_device)
    bias[0, ..., 7:] = torch.finfo(torch.float32).min
    bias[1] = torch.finfo(torch.float32).min
    found = check(q, k, v, bias_BHSL=bias)
    torch.testing.assert_close(found[1], v[1].mean(0).expand(5, 1, 16))
    check(q, k, v, bias_BHSL=bias.masked_fill(bias < 0, -torch.inf))


def test_views_of_one_projection_and_of_heads_first(triton_device):
    qkv = torch.randn(2, 20, 3, 4, 16).to(triton_device)
    check(*qkv.unbind(2))
    check(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv.unbind(2)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64])
def test_errs_no_more_than_twice_plain_torch(triton_device, dtype, dim):
    q, k, v = (t.to(dtype) for t in inputs(2, 40, 75, 2, dim, triton_device))
    bias = torch.randn(1, 2, 40, 75).to(triton_device, dtype)
    exact = flash_attention_ref(q.float(), k.float(), v.float(), scale=dim**-0.5, bias_BHSL=bias.float())
    plain = flash_attention_ref(q, k, v, scale=dim**-0.5, bias_BHSL=bias)
    found = flash_attention(q, k, v, scale=dim**-0.5, bias_BHSL=bias)
    assert found.dtype == dtype
    assert (found.float() - exact).norm() <= 2 * (plain.float() - exact).norm()


STARTS = [0, 20, 21, 21, 55]


@pytest.mark.parametrize("keys", [Keys(), Keys(causal=True), Keys(window=5)])
@pytest.mark.parametrize("launch", [SMALL, None])
def test_packed_sequences_with_tokens_after_the_last(triton_device, keys, launch):
    """A sequence may be empty; tokens that are no sequence's are not read."""
    qkv = torch.randn(70, 3, 2, 16).to(triton_device)
    qkv[55:] = torch.nan
    starts = torch.tensor(STARTS, dtype=torch.int32, device=triton_device)
    found = packed_attention(*qkv.unbind(1), starts, scale=0.3, keys=keys, launch=launch)
    expected = packed_attention_ref(*qkv.unbind(1), starts, scale=0.3, keys=keys)
    assert found.shape == (70, 2, 16)
    torch.testing.assert_close(found[:55], expected[:55], rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("keys", [Keys(window=5), Keys(window=30), Keys(True, window=5), Keys(True), Keys()])
def test_a_window_over_what_was_left_out(triton_device, keys):
    """Between the tokens: as far apart as in the padded batch, which is the twin's, too."""
    qkv = torch.randn(3, 90, 3, 2, 16).to(triton_device)
    mask = torch.rand(3, 90, device=triton_device) < 0.8
    mask[1, 20:55] = False
    starts = torch.tensor([0, *mask.sum(1).cumsum(0)], dtype=torch.int32, device=triton_device)
    places = mask.flatten().nonzero()[:, 0].int()
    packed = qkv[mask].unbind(1)
    expected = flash_attention_ref(*qkv.unbind(2), scale=0.3, keys=keys, mask_BL=mask)[mask]
    for attention in (packed_attention, packed_attention_ref):
        options = {"launch": SMALL} if attention is packed_attention else {}
        found = attention(*packed, starts, scale=0.3, keys=keys, place_T=places, **options)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("shape", [(1, 2, 40, 40), (4, 1, 1, 40), (1, 2, 1, 1)])
def test_packed_sequences_with_a_bias_by_position(triton_device, shape):
    qkv, bias = torch.randn(55, 3, 2, 16).to(triton_device), torch.randn(shape).to(triton_device)
    starts = torch.tensor(STARTS, dtype=torch.int32, device=triton_device)
    found = packed_attention(*qkv.unbind(1), starts, scale=0.3, bias_BHSL=bias, launch=SMALL)
    expected = packed_attention_ref(
        *qkv.unbind(1), starts, scale=0.3, bias_BHSL=bias.expand(-1, -1, max(40, shape[2]), 40)
    )
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=5e-6)


def test_packed_sequences_with_other_keys(triton_device):
    q, kv = torch.randn(55, 2, 16).to(triton_device), torch.randn(30, 2, 2, 16).to(triton_device)
    starts, key_starts = (torch.tensor(x, dtype=torch.int32, device=triton_device) for x in (STARTS, [0, 3, 3, 10, 30]))
    found = packed_attention(q, *kv.unbind(1), starts, key_starts, scale=0.3, launch=SMALL)
    expected = packed_attention_ref(q, *kv.unbind(1), starts, key_starts, scale=0.3)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=5e-6)
    assert not found[20].any()  # it has no keys


def test_nothing_gives_nothing(triton_device):
    q, k, v = inputs(0, 3, 3, 2, 16, triton_device)
    assert flash_attention(q, k, v, scale=1.0).shape == (0, 3, 2, 16)
    q, k, v = inputs(2, 3, 0, 2, 16, triton_device)
    assert not flash_attention(q, k, v, scale=1.0).any()
    none = torch.zeros(1, dtype=torch.int32, device=triton_device)
    assert packed_attention(*(torch.randn(3, 2, 16, device=triton_device) for _ in range(3)), none, scale=1.0).shape


@pytest.mark.parametrize(
    ("queries", "heads", "dim", "rows"), [(16, 12, 64, 16), (1024, 12, 64, 128), (40, 8, 64, 32), (4096, 8, 256, 64)]
)
def test_small_batches_take_small_tiles(queries, heads, dim, rows):
    """By the interpreter's 8 processors."""
    assert choose_launch(queries, heads, dim, 2, torch.device("cpu")).rows_a_tile == rows


def test_refusals():
    q, k, v = inputs(1, 2, 3, 4, 16, "cpu", kv_heads=2)
    assert flash_refusal(q, k, v) == "device is cpu"
    assert flash_shape_refusal(q, k, v) is None
    assert flash_shape_refusal(q.double(), k, v) == "dtype is torch.float64"
    assert (
        flash_shape_refusal(q, k.half(), v) == "queries are torch.float32, keys torch.float16 and values torch.float32"
    )
    assert flash_shape_refusal(*inputs(1, 2, 3, 1, 257, "cpu")) == "heads of 257 are larger than 256"
    assert flash_shape_refusal(q, k[..., :8], v) == "heads of queries, keys and values differ in size"
    assert flash_shape_refusal(q[:, :, :3], k, v) == "3 query heads do not share 2 key heads"
    assert flash_shape_refusal(q.transpose(1, 3), q.transpose(1, 3), q.transpose(1, 3)) == "a head has gaps"
