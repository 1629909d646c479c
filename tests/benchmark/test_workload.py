"""What many streams are asked: the same for every engine, other tokens every round."""

from __future__ import annotations

import pytest

from paceline.benchmark.workload import LONGEST, SHORTEST, Workload, draw_asks
from paceline.errors import UsageError


def lengths(asks):
    return [(len(ask.prompt), ask.num_tokens) for ask in asks]


def test_fixed_lengths():
    asks = draw_asks(Workload(5, 12, 7), 256)
    assert lengths(asks) == [(12, 7)] * 5
    assert len({tuple(ask.prompt) for ask in asks}) == 5
    assert all(100 <= token < 256 for ask in asks for token in ask.prompt)


def test_mixed_lengths_have_the_mean_that_is_asked_and_bounds():
    workload = Workload(4000, 200, 100, mixed=True, seed=3)
    found = lengths(draw_asks(workload, 256))
    for index, mean in enumerate((200, 100)):
        values = [one[index] for one in found]
        assert sum(values) / len(values) == pytest.approx(mean, rel=0.06)  # the cut at LONGEST takes 2%
        assert min(values) >= SHORTEST
        assert max(values) <= LONGEST * mean
        assert len(set(values)) > 50
        assert min(values) < mean / 4
        assert max(values) > 3 * mean
    assert max(map(sum, found)) <= workload.longest


def test_rounds_have_the_same_lengths_and_other_tokens():
    workload = Workload(20, 30, 10, mixed=True, prefix=16, groups=3)
    first, second = draw_asks(workload, 256), draw_asks(workload, 256, 1)
    assert lengths(first) == lengths(second) == lengths(draw_asks(workload, 256))
    assert first == draw_asks(workload, 256)
    assert all(a.prompt[:16] != b.prompt[:16] for a, b in zip(first, second, strict=True))
    assert lengths(draw_asks(Workload(20, 30, 10, mixed=True, seed=1), 256)) != lengths(
        draw_asks(Workload(20, 30, 10, mixed=True), 256)
    )


def test_a_prefix_is_shared_within_its_group():
    asks = draw_asks(Workload(6, 8, 4, prefix=16, groups=2), 256)
    assert lengths(asks) == [(24, 4)] * 6
    prefixes = [tuple(ask.prompt[:16]) for ask in asks]
    assert prefixes[0::2] == [prefixes[0]] * 3
    assert prefixes[1::2] == [prefixes[1]] * 3
    assert prefixes[0] != prefixes[1]
    assert len({tuple(ask.prompt) for ask in asks}) == 6


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_requests": 0}, "num requests must be at least 1, got 0"),
        ({"input_len": 0}, "input len must be at least 1"),
        ({"output_len": -1}, "output len must be at least 1"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"prefix": -1}, "0 tokens or more"),
    ],
)
def test_what_is_refused(given, says):
    with pytest.raises(UsageError, match=says):
        Workload(**given)
