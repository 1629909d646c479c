from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paceline.encoders.batching import SPARE_TOKENS, batches

LENGTHS = st.lists(st.integers(1, 600), max_size=60)


@given(LENGTHS, st.integers(1, 2000), st.integers(1, 20))
def test_each_text_once_within_the_bounds(lengths: list[int], max_tokens: int, max_texts: int) -> None:
    found = batches(lengths, max_tokens, max_texts)
    assert sorted(place for batch in found for place in batch) == list(range(len(lengths)))
    for batch in found:
        own = [lengths[place] for place in batch]
        assert own == sorted(own, reverse=True)
        assert len(batch) <= max_texts
        assert len(batch) * max(own) <= max_tokens or len(batch) == 1
        assert len(batch) * max(own) - sum(own) <= SPARE_TOKENS


def test_like_lengths_share_a_batch_and_unlike_ones_do_not() -> None:
    assert batches([100, 8, 100, 8, 100], 2048, 64) == [[0, 2, 4], [1, 3]]
    assert batches([10] * 5, 30, 64) == [[0, 1, 2], [3, 4]]
    assert batches([10] * 5, 2048, 2) == [[0, 1], [2, 3], [4]]
    assert batches([], 2048, 64) == []
