"""What outcomes come to."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from paceline.benchmark.serve import arrivals
from paceline.benchmark.serve_figures import Outcome, Slo, percentiles, summarize
from paceline.errors import UsageError


def test_latencies_count_from_when_a_request_was_due():
    one = Outcome(due=1.0, sent=1.5, times=(2.0, 2.25, 3.0), output_tokens=5)
    assert one.ttft == 1.0
    assert one.latency == 2.0
    assert one.tpot == 0.25  # 1 s for the four tokens after the first, in two chunks
    assert one.itl == [0.25, 0.75]
    assert Outcome(0.0, 0.0, (1.0,), output_tokens=1).tpot is None
    assert Outcome(0.0, 0.0).ttft is None


def test_percentiles_are_values_that_were_seen():
    assert percentiles([None, *range(1, 101)]) == {"p50": 50, "p90": 90, "p99": 99}
    assert percentiles([3.0, 1.0]) == {"p50": 1.0, "p90": 3.0, "p99": 3.0}
    assert percentiles([None]) == {}


def test_a_round():
    good = Outcome(0.0, 0.0, (0.1, 0.2), 10, 2, True)
    slow = Outcome(0.0, 0.02, (1.0, 1.1), 30, 2, True)
    failed = Outcome(1.0, 1.0, (1.1,), error="429: full")
    one = summarize(2.0, 4.0, [good, slow, failed], Slo(ttft=0.5))
    assert (one.num_requests, one.num_failed, one.errors) == (3, 1, {"429: full": 1})
    assert (one.prompt_tokens, one.output_tokens) == (40, 4)
    assert (one.request_rate, one.output_rate, one.total_rate) == (0.5, 1.0, 11.0)
    assert one.ttft == {"p50": 0.1, "p90": 1.0, "p99": 1.0}  # a failed one's is left out
    assert one.late["p99"] == 0.02
    assert (one.good_rate, one.good_share) == (0.25, pytest.approx(1 / 3))
    assert summarize(2.0, 4.0, [good], None).good_share is None


def test_an_slo_holds_all_its_bounds():
    slo = Slo.parse("ttft:500 tpot:50,e2el:2000")
    assert slo == Slo(0.5, 0.05, 2.0)
    assert slo.holds(Outcome(0.0, 0.0, (0.5, 0.549), output_tokens=2))
    assert not slo.holds(Outcome(0.0, 0.0, (0.51, 0.55), output_tokens=2))
    assert not slo.holds(Outcome(0.0, 0.0, (0.4, 0.46), output_tokens=2))
    assert not slo.holds(Outcome(0.0, 0.0, (0.4, 2.01), output_tokens=100))
    assert not slo.holds(Outcome(0.0, 0.0, (0.4,), error="gone"))
    assert slo.holds(Outcome(0.0, 0.0, (0.4,), output_tokens=1))  # has no time a token


@pytest.mark.parametrize("text", ["", "ttft", "ttft:x", "itl:5", "ttft:0", "ttft:nan"])
def test_an_slo_that_cannot_be_right(text):
    with pytest.raises(UsageError, match="--goodput"):
        Slo.parse(text)


def test_arrivals_are_a_poisson_process_by_seed():
    due = arrivals(4000, 5.0, 1)
    assert due == arrivals(4000, 5.0, 1) != arrivals(4000, 5.0, 2)
    assert due[0] == 0.0
    gaps = [later - earlier for earlier, later in pairwise(due)]
    assert sum(gaps) / len(gaps) == pytest.approx(0.2, rel=0.05)
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), rel=0.07)
    assert arrivals(3, math.inf, 1) == [0.0] * 3
