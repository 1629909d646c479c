"""Prompts of as many tokens as were asked for, whatever the server's tokenizer."""

from __future__ import annotations

import pytest

from paceline.benchmark.words import NUM_IDS, PROBES, WORDS, Scale, in_words, text_of
from paceline.benchmark.workload import Workload, draw_asks


def test_every_word_can_be_drawn():
    assert len(set(WORDS)) == len(WORDS)
    asks = draw_asks(Workload(1, 20_000, 1), NUM_IDS)
    assert set(text_of(asks[0].prompt).split()) == set(WORDS)


@pytest.mark.parametrize(("overhead", "per_word"), [(0, 1), (30, 1), (4, 5.5)])
def test_the_scale_is_found_and_undone(overhead, per_word):
    scale = Scale.of_probes([overhead + per_word * words for words in PROBES])
    assert scale == Scale(pytest.approx(overhead), pytest.approx(per_word))
    words = in_words(Workload(10, 200, 7, prefix=100, groups=2, seed=3), scale)
    assert overhead + per_word * (words.prefix + words.input_len) == pytest.approx(300, abs=per_word)
    assert per_word * words.prefix == pytest.approx(100, abs=per_word)
    assert (words.num_requests, words.output_len, words.groups, words.seed) == (10, 7, 2, 3)


def test_a_server_that_counts_nothing_gets_a_word_a_token():
    assert Scale.of_probes([0, 0]) == Scale()


def test_a_prompt_has_at_least_a_word():
    assert in_words(Workload(1, 5, 1), Scale(30.0, 1.0)).input_len == 1
