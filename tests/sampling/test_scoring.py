"""Log probabilities of given tokens equal log_softmax and a sort, whatever the slices."""

from __future__ import annotations

import math

import pytest
import torch

from paceline import sizing
from paceline.sampling.scoring import score_hidden, score_tokens

VOCAB = 50


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("rows_at_once", [1, 4, 9, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_the_log_softmaxs(logits, monkeypatch, rows_at_once, dtype):
    monkeypatch.setattr(sizing, "logprob_rows", lambda vocab_size, num_top: rows_at_once)
    logits = logits.to(dtype)
    tokens, num_top = [3, 0, 49, 7, 7, 21, 8, 30, 2], [0, 1, 3, -1, 50, 51, 10**9, 1, 0]
    entries = score_tokens(logits, tokens, num_top)
    expected = logits.float().log_softmax(dim=1)
    for row, (entry, token, k) in enumerate(zip(entries, tokens, num_top, strict=True)):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(expected[row, token].item(), abs=1e-6)
        assert entry.rank == int((expected[row] > expected[row, token]).sum()) + 1
        size = VOCAB if k < 0 else min(k, VOCAB)
        assert len(entry.top) == size
        assert list(entry.top.values()) == expected[row].sort(descending=True).values[:size].tolist()
        assert all(value == expected[row, i].item() for i, value in entry.top.items())


def test_hidden_states_go_through_the_head_a_slice_at_a_time(logits, monkeypatch):
    monkeypatch.setattr(sizing, "LOGPROB_WORKSPACE", 4 * VOCAB * sizing.LOGIT_BYTES + 20)
    seen: list[int] = []

    def head(hidden_SD: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden_SD))
        return hidden_SD

    entries = score_hidden(head, logits, VOCAB, list(range(9)), [0] * 9)
    assert seen == [4, 4, 1]
    assert entries == score_tokens(logits, list(range(9)), [0] * 9)
    seen.clear()
    score_hidden(head, logits, VOCAB, list(range(9)), [0] * 8 + [-1])
    assert seen == [2, 2, 2, 2, 1]  # 28 bytes a value where the whole vocabulary is returned, 16 where none is


def test_a_row_that_is_not_finite_is_seen(logits):
    logits[1, 4], logits[3, 4] = math.nan, math.inf
    entries = score_tokens(logits, [0] * 9, [0] * 9)
    assert [row for row, entry in enumerate(entries) if math.isnan(entry.logprob)] == [1, 3]


def test_no_rows():
    assert score_tokens(torch.empty(0, VOCAB), [], []) == []
