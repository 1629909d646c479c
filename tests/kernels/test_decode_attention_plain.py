"""The plain twin of the decode attention, on CPU, against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from paceline.kernels.alibi import alibi_slopes
from paceline.kernels.attention import paged_attention, paged_attention_ref


def run(batch, lengths=None, **options):
    """paged_attention with the lengths on the device, and the reference."""
    lens_R = torch.tensor(batch.metadata.seq_lens if lengths is None else lengths, dtype=torch.int32)
    static = dataclasses.replace(
        batch.metadata,
        seq_lens=(),
        lens_R=lens_R,
        groups=tuple(dataclasses.replace(group, segments=()) for group in batch.metadata.groups),
    )
    found = paged_attention(batch.q_THD, batch.kv, static, scale=0.3, **options)
    return found, paged_attention_ref(batch.q_THD, batch.kv, batch.metadata, scale=0.3, **options)


@pytest.mark.parametrize("requests", [[(17, 1)], [(1, 1), (70, 1), (16, 1), (5, 1)], [(37, 4), (4, 4)]])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize(("soft_cap", "alibi"), [(None, False), (2.0, True)])
def test_equals_the_reference(make_batch, requests, window, soft_cap, alibi):
    """`padded=False`: slots that no request owns hold NaN, and a block's last slots too."""
    batch = make_batch(requests, window=window, padded=False)
    found, expected = run(batch, soft_cap=soft_cap, slopes_H=torch.tensor(alibi_slopes(4)) if alibi else None)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


def test_multi_query_in_bfloat16(make_batch):
    batch = make_batch([(33, 1), (4, 1)], heads=6, kv_heads=1, padded=False, dtype=torch.bfloat16)
    found, expected = run(batch)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-9)


def test_unused_rows_give_zeros(make_batch):
    found, expected = run(make_batch([(20, 1), (7, 1), (9, 1)], padded=False), lengths=[20, 0, 9])
    assert not found[1].any()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=2e-5, atol=2e-6)


def test_unequal_shares_are_refused(make_batch):
    with pytest.raises(ValueError, match="5 tokens are not equally many for each of 2 requests"):
        run(make_batch([(20, 2), (7, 3)]))
