from __future__ import annotations

import pytest
import torch

from paceline.kernels.attention import paged_attention, paged_attention_ref

BATCHES = {
    "one decode": [(1, 1)],
    "one long decode": [(37, 1)],
    "prefill": [(9, 9)],
    "chunk after a prefix": [(13, 6)],
    "decodes": [(5, 1), (12, 1), (1, 1), (300, 1)],
    "mixed": [(7, 7), (20, 1), (11, 3), (33, 1), (8, 8), (2, 1)],
    "drafts": [(9, 5), (30, 5), (5, 5), (140, 5), (12, 1), (7, 1), (20, 3)],
    "idle request": [(6, 0), (9, 2)],
}


@pytest.mark.parametrize("requests", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("consecutive", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_equals_the_reference(make_batch, requests, window, soft_cap, consecutive, padded):
    batch = make_batch(requests, window=window, consecutive=consecutive, padded=padded)
    args = (batch.q_THD, batch.kv, batch.metadata)
    expected = paged_attention_ref(*args, scale=0.3, soft_cap=soft_cap)
    actual = paged_attention(*args, scale=0.3, soft_cap=soft_cap)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 3), (6, 1)], ids=["MHA", "GQA", "MQA"])
def test_head_groupings(make_batch, heads, kv_heads):
    batch = make_batch(BATCHES["mixed"], heads=heads, kv_heads=kv_heads)
    expected = paged_attention_ref(batch.q_THD, batch.kv, batch.metadata, scale=0.3)
    torch.testing.assert_close(
        paged_attention(batch.q_THD, batch.kv, batch.metadata, scale=0.3), expected, rtol=2e-5, atol=2e-6
    )


@pytest.mark.parametrize("requests", BATCHES.values(), ids=BATCHES.keys())
def test_bfloat16_error_is_that_of_its_rounding(make_batch, requests):
    """At most twice the error of rounding the float32 result's inputs to bfloat16, computed in float32."""
    batch = make_batch(requests, dtype=torch.bfloat16)
    exact = paged_attention_ref(batch.q_THD.float(), batch.kv, batch.metadata, scale=0.3)
    floor = (exact.to(torch.bfloat16).float() - exact).norm()
    error = (paged_attention(batch.q_THD, batch.kv, batch.metadata, scale=0.3).float() - exact).norm()
    assert error <= 2 * floor + 2**-8 * exact.norm()


def test_a_view_is_read_without_copying(make_batch):
    batch = make_batch([(40, 1)], consecutive=True)
    (segment,) = batch.metadata.groups[0].segments
    assert isinstance(segment.keys, slice)
    assert segment.mask is None


def test_decodes_are_batched_by_length(make_batch):
    batch = make_batch([(5, 1), (100, 1), (900, 1), (1000, 1)])
    assert sorted(s.num_requests for s in batch.metadata.groups[0].segments) == [2, 2]


def test_decodes_with_as_many_drafts_are_one_batch(make_batch):
    batch = make_batch([(9, 5), (30, 5), (12, 1), (7, 1), (8, 5), (40, 20)])
    assert sorted(s.num_requests for s in batch.metadata.groups[0].segments) == [1, 2, 3]
