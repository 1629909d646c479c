"""Ready is said only of an engine that was heard of lately and steps while it has work."""

from __future__ import annotations

import pytest

from paceline.errors import UsageError
from paceline.serve.client import EngineCounters, Startup
from paceline.serve.health import Deadlines, status_of
from paceline.serve.messages import Beat, Load

DEADLINES = Deadlines(beat=3, step=60)


def judged(state: str = "ready", age: float = 0.1, stuck: float | None = None) -> tuple[str, bool, bool]:
    beat = Beat(Startup(), Load(), stuck, last_step_age=stuck)
    status = status_of(state, "so", beat, age, DEADLINES)  # type: ignore[arg-type]
    return status.state, status.alive, status.ready


def test_an_engine_at_rest_is_ready():
    assert judged() == ("ready", True, True)


def test_silence_is_a_stall_and_no_death():
    assert judged(age=2.9) == ("ready", True, True)
    assert judged(age=3.1) == ("stalled", True, False)


def test_work_without_steps_is_a_stall():
    assert judged(stuck=59) == ("ready", True, True)
    assert judged(stuck=59, age=1.5) == ("stalled", True, False)


@pytest.mark.parametrize(
    ("state", "alive"),
    [("starting", True), ("restarting", True), ("draining", True), ("dead", False), ("closed", False)],
)
def test_only_a_ready_one_takes_requests(state, alive):
    assert judged(state) == (state, alive, False)


def test_what_earlier_engines_counted_is_added():
    beat = Beat(Startup(), Load(running=2, counters=EngineCounters(steps=5, generation_tokens=7)), None, 1.5)
    status = status_of("ready", None, beat, 0.5, DEADLINES, restarts=1, earlier=EngineCounters(steps=10))
    assert (status.counters.steps, status.counters.generation_tokens, status.running) == (15, 7, 2)
    assert (status.last_step_age, status.restarts, status.reason) == (2.0, 1, None)


@pytest.mark.parametrize("name", ["beat", "step", "resume"])
def test_a_deadline_of_nothing_is_refused(name):
    with pytest.raises(UsageError, match=f"'{name}' must be greater than 0"):
        Deadlines(**{name: 0})
