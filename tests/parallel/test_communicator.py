"""Sums and gathers over the ranks."""

from __future__ import annotations

import pytest
import torch

from paceline.config import ParallelConfig
from paceline.formats.dense import DenseWeight
from paceline.kernels.one_shot import one_shot_ref
from paceline.layers.linear import Linear
from paceline.parallel.linear import RowParallel, VocabParallel

CPU = torch.device("cpu")


def partials(count, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 40, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [2, 4])
def test_a_sum_is_the_same_bits_on_every_rank_and_the_twins_value(run_ranks, dtype, count):
    given = partials(count, dtype)
    found = run_ranks(ParallelConfig(count), lambda c: c.all_reduce(given[c.rank.tensor].clone()))
    for one in found[1:]:
        assert torch.equal(one, found[0])
    expected = one_shot_ref(given)
    assert expected.dtype == dtype
    # gloo rounds after every addition, the twin once.
    torch.testing.assert_close(
        found[0], expected, rtol=count * torch.finfo(dtype).eps, atol=count * torch.finfo(dtype).eps
    )


def test_gathered_columns_lie_in_the_order_of_the_ranks(run_ranks):
    found = run_ranks(ParallelConfig(2), lambda c: c.gather_columns(torch.full((2, 3), float(c.rank.tensor))))
    for one in found:
        assert one.tolist() == [[0, 0, 0, 1, 1, 1]] * 2


def test_all_agree_on_the_least(run_ranks):
    found = run_ranks(ParallelConfig(2, 2), lambda c: c.agree([c.rank.index + 5, 9 - c.rank.index], CPU))
    assert found == [[5, 6]] * 4


@pytest.mark.parametrize("residual", [True, False])
def test_bias_and_residual_are_added_once(run_ranks, residual):
    generator = torch.Generator().manual_seed(0)
    x_TK, w_NK, r_TN = (torch.randn(shape, generator=generator) for shape in ((3, 8), (6, 8), (3, 6)))
    bias_N = torch.randn(6, generator=generator)

    def work(c):
        own = slice(4 * c.rank.tensor, 4 * c.rank.tensor + 4)
        linear = Linear(DenseWeight(w_NK[:, own].contiguous()), bias_N if c.rank.leads else None)
        return RowParallel(linear, c)(x_TK[:, own], residual_TN=r_TN if residual else None)

    expected = x_TK @ w_NK.T + bias_N + (r_TN if residual else 0)
    for found in run_ranks(ParallelConfig(2), work):
        torch.testing.assert_close(found, expected)


def test_a_head_whose_words_do_not_divide_gives_them_all(run_ranks):
    generator = torch.Generator().manual_seed(0)
    x_TK, w_VK = torch.randn(2, 8, generator=generator), torch.randn(7, 8, generator=generator)

    def work(c):
        own = range(7)[c.rank.tensor * 2 : c.rank.tensor * 2 + 2]
        return VocabParallel(Linear(DenseWeight(w_VK[own.start : own.stop])), c, 7)(x_TK)

    for found in run_ranks(ParallelConfig(4), work):
        torch.testing.assert_close(found, x_TK @ w_VK.T)
