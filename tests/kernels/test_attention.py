from __future__ import annotations

import pytest
import torch

from paceline.kernels import attention
from paceline.kernels.alibi import alibi_slopes
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


def slopes(heads: int) -> torch.Tensor:
    return torch.tensor(alibi_slopes(heads))


@pytest.mark.parametrize("requests", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (5, None), (None, 2.0), (5, 2.0)])
@pytest.mark.parametrize(("consecutive", "padded"), [(True, True), (False, True), (False, False)])
def test_alibi_equals_the_reference(make_batch, requests, window, soft_cap, consecutive, padded):
    batch = make_batch(requests, window=window, consecutive=consecutive, padded=padded)
    args = (batch.q_THD, batch.kv, batch.metadata)
    options = {"scale": 0.3, "soft_cap": soft_cap, "slopes_H": slopes(4)}
    expected = paged_attention_ref(*args, **options)
    torch.testing.assert_close(paged_attention(*args, **options), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 3), (7, 1)], ids=["MHA", "GQA", "MQA"])
def test_alibi_head_groupings(make_batch, heads, kv_heads):
    """Numbers of heads that are no powers of two, and a slope of each query head where they share keys."""
    batch = make_batch(BATCHES["mixed"], heads=heads, kv_heads=kv_heads)
    args = (batch.q_THD, batch.kv, batch.metadata)
    expected = paged_attention_ref(*args, scale=0.3, slopes_H=slopes(heads))
    torch.testing.assert_close(
        paged_attention(*args, scale=0.3, slopes_H=slopes(heads)), expected, rtol=2e-5, atol=2e-6
    )


@pytest.mark.parametrize("heads", [4, 6])
@pytest.mark.parametrize("requests", [[(11, 11)], [(11, 4)], [(11, 1)], [(11, 1), (7, 1)]])
def test_alibi_equals_blooms_attention(make_batch, heads, requests):
    """The keys of the cache through transformers' module, whose projections here only sort and unsort heads."""
    from transformers import BloomConfig
    from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

    dim = 8
    width = heads * dim
    theirs = BloomAttention(BloomConfig(hidden_size=width, n_head=heads), layer_idx=0).eval()
    theirs.query_key_value = torch.nn.Identity()
    theirs.dense = torch.nn.Identity()
    batch = make_batch(requests, heads=heads, kv_heads=heads, dim=dim)
    found_THD = paged_attention(batch.q_THD, batch.kv, batch.metadata, scale=dim**-0.5, slopes_H=slopes(heads))
    table = batch.metadata.groups[0].block_tables_RB
    first = 0
    for r, (context, queries) in enumerate(requests):
        slots = [int(table[r, p // 4]) * 4 + p % 4 for p in range(context)]
        q_LHD = torch.zeros(context, heads, dim)
        q_LHD[context - queries :] = batch.q_THD[first : first + queries]
        k_LHD, v_LHD = (cache_HSD[:, slots].transpose(0, 1) for cache_HSD in (batch.kv.k_HSD, batch.kv.v_HSD))
        fused_1LX = torch.stack((q_LHD, k_LHD, v_LHD), dim=2).view(1, context, 3 * width)
        alibi = build_alibi_tensor(torch.ones(1, context), heads, torch.float32)
        mask = torch.full((context, context), float("-inf")).triu(1)
        expected_1LX, _ = theirs(fused_1LX, torch.zeros(1, context, width), alibi, mask)
        expected = expected_1LX[0, context - queries :].view(queries, heads, dim)
        torch.testing.assert_close(found_THD[first : first + queries], expected, rtol=2e-5, atol=2e-6)
        first += queries


@pytest.mark.parametrize("limit", [1, 4 * 4 * 20 * 3, 4 * 4 * 20 * 5], ids=["rows of 1", "rows of 3", "rows of 5"])
@pytest.mark.parametrize("options", [{"slopes_H": slopes(4)}, {"soft_cap": 2.0}], ids=["alibi", "soft cap"])
@pytest.mark.parametrize("requests", [[(20, 20)], [(20, 11)]], ids=["prefill", "chunk"])
def test_slices_of_scores_change_nothing(make_batch, monkeypatch, limit, options, requests):
    """A long prompt's scores are taken a few queries at a time; the last slice may be shorter."""
    batch = make_batch(requests)
    args = (batch.q_THD, batch.kv, batch.metadata)
    expected = paged_attention_ref(*args, scale=0.3, **options)
    shapes = []
    softmax = torch.softmax
    monkeypatch.setattr(attention, "SCORE_BYTES", limit)
    monkeypatch.setattr(torch, "softmax", lambda x, dim: shapes.append(x.shape) or softmax(x, dim=dim))
    found = paged_attention(*args, scale=0.3, **options)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)
    assert max(4 * shape.numel() for shape in shapes) <= max(limit, 4 * 4 * 20)
    assert len(shapes) > 1


def plain_alibi(q_HQD: torch.Tensor, k_HLD: torch.Tensor, v_HLD: torch.Tensor, scale: float) -> torch.Tensor:
    """What plain torch gives in the dtype of its arguments, the biased scores in float32."""
    queries, keys = q_HQD.shape[1], k_HLD.shape[1]
    distance_QL = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    scores_HQL = (q_HQD @ k_HLD.transpose(1, 2)).float() * scale - slopes(q_HQD.shape[0])[:, None, None] * distance_QL
    return scores_HQL.masked_fill(distance_QL < 0, float("-inf")).softmax(-1).to(q_HQD.dtype) @ v_HLD


@pytest.mark.parametrize("requests", [[(9, 9)], [(700, 700)], [(1200, 9)], [(1200, 1)], [(1200, 1), (1100, 1)]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_alibi_loses_no_more_than_plain_torch(make_batch, requests, dtype):
    """A prompt's first query is 700 keys from its last: its biases reach 350, where the steps of bfloat16 are 2."""
    heads, dim, scale = 8, 8, 0.3
    batch = make_batch(requests, heads=heads, kv_heads=heads, dtype=dtype, block_size=16)
    args = (batch.q_THD, batch.kv, batch.metadata)
    found = paged_attention(*args, scale=scale, slopes_H=slopes(heads))
    table, first = batch.metadata.groups[0].block_tables_RB, 0
    for r, (context, queries) in enumerate(requests):
        slots = [int(table[r, p // 16]) * 16 + p % 16 for p in range(context)]
        q_HQD = batch.q_THD[first : first + queries].transpose(0, 1)
        k_HLD, v_HLD = batch.kv.k_HSD[:, slots], batch.kv.v_HSD[:, slots]
        exact = plain_alibi(q_HQD.double(), k_HLD.double(), v_HLD.double(), scale).transpose(0, 1)
        plain = plain_alibi(q_HQD, k_HLD, v_HLD, scale).transpose(0, 1)
        error = (found[first : first + queries].double() - exact).norm()
        assert found.dtype == dtype
        assert error <= 2 * (plain.double() - exact).norm()
        first += queries
        assert exact.shape == (queries, heads, dim)
