"""The search by example, on made-up log probabilities; tests/oracle/test_beams.py holds it to transformers'."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from paceline.engine.beams import BeamSearch
from paceline.sampling.logprobs import Candidates, TokenLogprobs
from paceline.sampling.params import SamplingParams

END = 9


def candidates(**logprobs: float) -> Candidates:
    """candidates(t1=-0.5, t9=-1.0): tokens and log probabilities, best first."""
    ids = tuple(int(name[1:]) for name in logprobs)
    values = tuple(logprobs.values())
    return Candidates(ids, values, tuple(value * 2 for value in values))


def search(width: int = 2, max_tokens: int = 10, **params: object) -> BeamSearch:
    return BeamSearch(SamplingParams(use_beam_search=True, n=width, **params), {END}, max_tokens)


def tokens(made: BeamSearch) -> list[tuple[int, ...]]:
    return [beam.token_ids for beam in made.beams]


def test_the_best_continuations_of_all_beams_go_on():
    made = search()
    assert made.advance([candidates(t1=-0.1, t2=-1.0, t3=-3.0)]) == [0, 0]
    assert tokens(made) == [(1,), (2,)]
    assert made.advance([candidates(t4=-2.0, t5=-5.0), candidates(t6=-0.2, t7=-0.3)]) == [1, 1]
    assert tokens(made) == [(2, 6), (2, 7)]
    assert [beam.logprob for beam in made.beams] == pytest.approx([-1.2, -1.3])
    assert [beam.raw_logprob for beam in made.beams] == pytest.approx([-2.4, -2.6])


def test_an_end_among_the_best_is_an_answer_and_a_worse_one_is_not():
    made = search()
    made.advance([candidates(t1=-0.1, t9=-0.2, t2=-0.3, t3=-4.0)])
    assert [answer.beam.token_ids for answer in made.answers] == [(END,)]
    assert tokens(made) == [(1,), (2,)]
    made = search()
    made.advance([candidates(t1=-0.1, t2=-0.15)])
    made.advance([candidates(t3=-0.1, t9=-0.2), candidates(t9=-0.2, t4=-0.3)])
    assert [answer.beam.token_ids for answer in made.answers] == [(1, END)]  # (2, END) is third, of two beams
    assert tokens(made) == [(1, 3), (2, 4)]


def test_min_tokens_keep_a_beam_from_ending():
    made = search(min_tokens=1)
    made.advance([candidates(t9=-0.1, t1=-0.2)])
    assert made.answers == []
    assert tokens(made) == [(END,), (1,)]


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "steps"),
    [
        (True, 1.0, 2),  # two answers are enough
        (False, 1.0, 4),  # the best beam's mean falls from -0.65 to -0.93 to -1.08; the worst answer's is -1.0
        (False, 0.0, 3),  # its sum falls from -1.3 to -2.8; the worst answer's is -1.4
        (False, -1.0, 3),
        ("never", 1.0, 8),  # over ten tokens a sum of -8.8 might yet be a mean of -0.88, and one of -10.3 not
        ("never", 0.0, 3),
        ("never", -1.0, 3),
    ],
)
def test_when_the_search_ends(early_stopping, length_penalty, steps):
    made = search(early_stopping=early_stopping, length_penalty=length_penalty)
    made.advance([candidates(t9=-1.0, t1=-1.1, t2=-5.0)])
    made.advance([candidates(t3=-0.2, t9=-0.3), candidates(t4=-9.0)])
    assert {answer.beam.token_ids for answer in made.answers} == {(END,), (1, END)}
    taken = 2
    while made.beams:
        made.advance([candidates(t5=-1.5, t6=-20.0) for _ in made.beams])
        taken += 1
    assert taken == steps


def test_the_longest_length_ends_all_beams():
    made = search(max_tokens=2)
    made.advance([candidates(t1=-0.1, t2=-1.0)])
    assert made.advance([candidates(t3=-0.5, t9=-0.6), candidates(t4=-0.1)]) == []
    assert [(a.beam.token_ids, a.finish_reason) for a in made.answers] == [((1, 3), "length"), ((1, 9), "stop")]
    assert [a.score for a in made.answers] == pytest.approx([-0.3, -0.35])


def test_a_better_answer_pushes_out_the_worst():
    made = search(width=2, length_penalty=2.0)
    made.advance([candidates(t9=-1.0, t1=-1.1)])
    made.advance([candidates(t9=-0.1, t2=-0.2)])
    assert [a.beam.token_ids for a in made.answers] == [(1, 9), (9,)]
    made.advance([candidates(t9=-0.1, t3=-0.3)])
    assert [a.beam.token_ids for a in made.answers] == [(1, 2, 9), (1, 9)]


def test_where_tokens_are_few_beams_are_fewer():
    made = search(width=3)
    assert made.advance([candidates(t1=-0.1)]) == [0]
    assert made.advance([Candidates((), (), ())]) == []
    assert made.answers == []


def test_a_masked_candidate_is_none():
    made = search()
    made.advance([Candidates((1, 2), (-0.5, float("-inf")), (-0.5, -0.7))])
    assert tokens(made) == [(1,)]


def test_log_probabilities_follow_their_beam():
    made = search()
    entries = tuple(TokenLogprobs(token, -0.5, 1, {}) for token in (1, 2, 3, 4))
    made.advance([Candidates((1, 2), (-0.1, -0.2), (-0.1, -0.2), entries[:2])])
    made.advance([Candidates((3,), (-9.0,), (-9.0,), entries[2:3]), Candidates((4,), (-0.1,), (-0.1,), entries[3:])])
    assert [[entry.token_id for entry in beam.entries] for beam in made.beams] == [[2, 4], [1, 3]]


def test_wide_enough_beams_find_the_very_best():
    """With a beam for every sequence the search is exhaustive: 3 tokens, 4 steps, Markov scores."""
    scores = {(a, b): -((a * 5 + b * 7 + a * b) % 11) / 4 - 0.1 for a in range(4) for b in range(3)}
    made = BeamSearch(SamplingParams(use_beam_search=True, n=81, length_penalty=0.0), (), 4)
    while made.beams:
        lasts = [beam.token_ids[-1] if beam.token_ids else 3 for beam in made.beams]
        rows = [tuple(scores[last, token] for token in range(3)) for last in lasts]
        made.advance([Candidates((0, 1, 2), values, values) for values in rows])
    every = {
        path: sum(scores[a, b] for a, b in itertools.pairwise((3, *path)))
        for path in itertools.product(range(3), repeat=4)
    }
    assert [a.score for a in made.answers] == pytest.approx(sorted(every.values(), reverse=True))
    assert {a.beam.token_ids for a in made.answers} == set(every)


def test_the_search_needs_no_torch():
    code = "import sys, paceline.engine.beams, paceline.engine.beam_request; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
