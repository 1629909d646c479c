"""What may wait, and when to ask again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import QueueFullError, UsageError
from paceline.serve.admission import QueueLimits, WaitingRoom


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_requests_beyond_the_free_seats_are_bounded(clock):
    room = WaitingRoom(QueueLimits(max_requests=2), clock)
    for name in "abcd":  # two seats, two in the queue
        room.check(5, free_seats=2)
        room.join(name, 5)
    with pytest.raises(QueueFullError, match="4 requests wait and the queue takes 2"):
        room.check(5, free_seats=2)
    room.start("a", clock.now)
    room.check(5, free_seats=2)


def test_a_queue_of_none_takes_what_can_run(clock):
    room = WaitingRoom(QueueLimits(max_requests=0), clock)
    room.check(5, free_seats=1)
    room.join("a", 5)
    with pytest.raises(QueueFullError):
        room.check(5, free_seats=1)


def test_tokens_are_bounded_and_a_long_request_may_wait_alone(clock):
    room = WaitingRoom(QueueLimits(max_requests=None, max_tokens=100), clock)
    room.check(1000, free_seats=0)
    room.join("a", 60)
    room.check(40, free_seats=0)
    with pytest.raises(QueueFullError, match="60 prompt tokens wait already and the queue takes 100, which 41 more"):
        room.check(41, free_seats=0)
    room.leave("a")
    room.check(41, free_seats=0)


def test_when_to_ask_again_follows_the_pace_of_starts(clock):
    room = WaitingRoom(QueueLimits(max_requests=1), clock)
    for index in range(10):  # one start every 3 s
        room.join(str(index), 1)
        clock.now += 3
        assert room.start(str(index), clock.now) == 3
    for name in "abc":
        room.join(name, 1)
    with pytest.raises(QueueFullError) as raised:
        room.check(1, free_seats=0)
    assert raised.value.retry_after == pytest.approx(3 * 3, rel=0.15)
    clock.now += 1e6
    with pytest.raises(QueueFullError) as raised:
        room.check(1, free_seats=0)
    assert raised.value.retry_after == 60


def test_without_a_pace_it_is_a_second(clock):
    room = WaitingRoom(QueueLimits(max_requests=0), clock)
    with pytest.raises(QueueFullError) as raised:
        room.check(1, free_seats=0)
    assert raised.value.retry_after == 1


@given(st.lists(st.tuples(st.sampled_from(["join", "start", "leave"]), st.integers(0, 5), st.integers(1, 50))))
def test_the_books_agree_whatever_happens(actions):
    room, waiting = WaitingRoom(QueueLimits(), Clock()), {}
    for action, number, num_tokens in actions:
        name = str(number)
        if action == "join" and name not in waiting:
            room.join(name, num_tokens)
            waiting[name] = num_tokens
        elif action == "start":
            assert (room.start(name, 200.0) is None) == (name not in waiting)
            waiting.pop(name, None)
        elif action == "leave":
            room.leave(name)
            waiting.pop(name, None)
        assert (len(room), room.num_tokens) == (len(waiting), sum(waiting.values()))


@pytest.mark.parametrize("bad", [{"max_requests": -1}, {"max_tokens": -1}])
def test_a_bound_below_nothing_is_refused(bad):
    with pytest.raises(UsageError, match="at least 0"):
        QueueLimits(**bad)
