from __future__ import annotations

import pytest
import torch

from paceline.kernels.alibi import alibi_slopes


def test_slopes_of_eight_heads_are_the_papers():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]


def test_slopes_of_twelve_heads_end_with_every_other_one_of_sixteen():
    assert alibi_slopes(12) == [*alibi_slopes(8), *alibi_slopes(16)[::2][:4]]


@pytest.mark.parametrize("heads", [1, 2, 3, 12, 32, 71, 112])
def test_slopes_are_those_of_bloom_and_mpt(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    bloom_HL = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32).view(heads, 2)
    mpt_HL = build_mpt_alibi_tensor(heads, 2).view(heads, 2)
    found_H = torch.tensor(alibi_slopes(heads))
    torch.testing.assert_close(found_H, bloom_HL[:, 1] - bloom_HL[:, 0])
    torch.testing.assert_close(found_H, mpt_HL[:, 1] - mpt_HL[:, 0])
