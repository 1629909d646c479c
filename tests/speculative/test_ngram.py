from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.config import SpeculativeConfig
from paceline.speculative.ngram import NgramIndex, propose

CONFIG = SpeculativeConfig(num_speculative_tokens=3, prompt_lookup_min=2, prompt_lookup_max=3)


@pytest.mark.parametrize(
    ("tokens", "drafts"),
    [
        ([], ()),
        ([1, 2], ()),
        ([1, 2, 3, 4, 5, 1, 2], (3, 4, 5)),
        ([1, 2, 7, 1, 2, 8, 1, 2], (8, 1, 2)),  # the most recent occurrence
        ([9, 1, 2, 7, 1, 2, 8, 9, 1, 2], (7, 1, 2)),  # a longer suffix is better evidence than a later one
        ([4, 1, 5, 1], ()),  # one token is below the minimum
        ([1, 1, 1, 1], (1,)),  # occurrences may overlap
    ],
)
def test_proposals(tokens, drafts):
    assert propose(tokens, CONFIG) == drafts
    assert NgramIndex(CONFIG, tokens).propose() == drafts


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=8),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 3)),
)
def test_the_index_proposes_what_the_search_proposes(parts, sizes):
    count, least, more = sizes
    config = SpeculativeConfig(num_speculative_tokens=count, prompt_lookup_min=least, prompt_lookup_max=least + more)
    index, tokens = NgramIndex(config), []
    for part in parts:
        index.extend(part)
        tokens += part
        assert len(index) == len(tokens)
        assert index.propose() == propose(tokens, config)


def test_a_proposal_does_not_search_a_long_context():
    index = NgramIndex(CONFIG, range(200_000))
    start = time.perf_counter()
    for token in range(100):
        index.extend([token])
        index.propose()
    assert time.perf_counter() - start < 0.05  # about 0.3 ms; one search of this context takes 20 ms
