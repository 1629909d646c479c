"""The arithmetic of MBU, against a count made token by token."""

from __future__ import annotations

import pytest

from paceline.benchmark.mbu import DecodeFigures, decode_bytes


@pytest.mark.parametrize(("first_context", "num_tokens"), [(33, 1), (33, 2), (33, 128), (1, 7)])
def test_decode_bytes_is_the_sum_over_steps(first_context, num_tokens):
    weights, kv = 1_000_003, 46_080
    counted = sum(weights + kv * context for context in range(first_context, first_context + num_tokens))
    assert counted == decode_bytes(
        weight_bytes=weights,
        kv_bytes_per_token=kv,
        num_steps=num_tokens,
        first_context=first_context,
        num_tokens=num_tokens,
    )


def test_accepted_drafts_save_whole_passes_over_the_weights():
    sizes = {"weight_bytes": 1_000_000, "kv_bytes_per_token": 10, "first_context": 1, "num_tokens": 100}
    assert decode_bytes(num_steps=50, **sizes) * 2 == decode_bytes(num_steps=100, **sizes)


def test_figures():
    figures = DecodeFigures(num_tokens=64, seconds=2.0, bytes_moved=40_000_000_000, bandwidth=25e9)
    assert figures.tokens_per_second == 32
    assert figures.bytes_per_second == 20e9
    assert figures.mbu == pytest.approx(0.8)
