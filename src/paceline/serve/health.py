"""Whether an engine can be said to be ready, from what was last heard of it. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.errors import UsageError
from paceline.serve.client import EngineCounters, EngineState, EngineStatus
from paceline.serve.messages import Beat


@dataclass(frozen=True)
class Deadlines:
    """Seconds. `beat`: silence after which an engine's process counts as stopped; its beats come from a thread of their
    own, so a long step does not delay them. `step`: how long a step may take while there is work. `resume`: how long
    the requests of an engine that died wait for the next one."""

    beat: float = 3.0
    step: float = 60.0
    resume: float = 4.0

    def __post_init__(self) -> None:
        for name in ("beat", "step", "resume"):
            if not getattr(self, name) > 0:
                raise UsageError(f"the deadline '{name}' must be greater than 0, got {getattr(self, name)}")


def hang_of(beat: Beat, beat_age: float, deadlines: Deadlines) -> str | None:
    """Why an engine that was ready is not to be relied on; None if it is fine."""
    if beat_age > deadlines.beat:
        return f"nothing was heard of the engine for {beat_age:.1f} s"
    stuck = beat.stuck_seconds
    if stuck is not None and stuck + beat_age > deadlines.step:
        return f"the engine has work and ended no step for {stuck + beat_age:.1f} s"
    return None


def status_of(
    state: EngineState,
    reason: str | None,
    beat: Beat,
    beat_age: float,
    deadlines: Deadlines,
    *,
    restarts: int = 0,
    earlier: EngineCounters | None = None,
) -> EngineStatus:
    """`earlier`: what the engines before this one have counted."""
    if state == "ready":
        hang = hang_of(beat, beat_age, deadlines)
        state, reason = ("ready", None) if hang is None else ("stalled", hang)
    load = beat.load
    return EngineStatus(
        state=state,
        alive=state not in ("dead", "closed"),
        ready=state == "ready",
        startup=beat.startup,
        last_step_age=None if beat.last_step_age is None else beat.last_step_age + beat_age,
        running=load.running,
        waiting=load.waiting,
        waiting_tokens=load.waiting_tokens,
        kv_usage=load.kv_usage,
        restarts=restarts,
        counters=load.counters if earlier is None else added(earlier, load.counters),
        reason=reason,
    )


def added(one: EngineCounters, other: EngineCounters) -> EngineCounters:
    fields = EngineCounters.__struct_fields__
    return EngineCounters(**{name: getattr(one, name) + getattr(other, name) for name in fields})
