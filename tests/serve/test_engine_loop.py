"""The loop, one iteration at a time: a script stands where clients are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from paceline.config import CacheConfig, SchedulerConfig
from paceline.engine.build import load_model
from paceline.engine.engine import Engine
from paceline.engine.load_options import LoadOptions
from paceline.engine.warm_up import WarmUp
from paceline.phases import Phases
from paceline.serve.admission import QueueLimits
from paceline.serve.client import GenerateRequest, ModelInfo
from paceline.serve.engine_loop import EngineLoop
from paceline.serve.messages import (
    Abort,
    Accepted,
    EndAnswer,
    Event,
    Forget,
    FromEngine,
    Hello,
    Ready,
    Refused,
    Shutdown,
    StepEvents,
    Submit,
    ToEngine,
)

INFO = ModelInfo("tiny", 64, 4096, 2, "float32", "cpu", None, {}, 256, {})


def submit(request: GenerateRequest, *resumed: object, number: int = 0) -> Submit:
    return Submit(number, request, *resumed)  # type: ignore[arg-type]


class Script:
    """A Port. Each `receive` takes the next act: messages of client b"a", or of those who are named."""

    def __init__(self, *acts: object) -> None:
        self.acts: Iterator[object] = iter(acts)
        self.sent: list[tuple[bytes, FromEngine]] = []
        self.waits: list[bool] = []

    def receive(self, *, wait: bool) -> list[tuple[bytes, ToEngine]]:
        self.waits.append(wait)
        act = next(self.acts, Shutdown())
        if callable(act):
            act = act()
        messages = act if isinstance(act, list) else [] if act is None else [act]
        return [one if isinstance(one, tuple) else (b"a", one) for one in messages]

    def send(self, client: bytes, message: FromEngine) -> None:
        self.sent.append((client, message))

    def events(self, client: bytes = b"a") -> list[Event]:
        return [e for to, m in self.sent if to == client and isinstance(m, StepEvents) for e in m.events]

    def only(self, kind: type) -> list[FromEngine]:
        return [message for _, message in self.sent if isinstance(message, kind)]


@pytest.fixture(scope="module")
def engine(tiny_weights: Path) -> Engine:
    cache = CacheConfig(block_size=4, num_blocks=64, enable_prefix_caching=False)
    options = LoadOptions(
        str(tiny_weights),
        device="cpu",
        cache=cache,
        scheduler=SchedulerConfig(max_num_seqs=2),
        skip_tokenizer_init=True,
    )
    return load_model(options).engine


@pytest.fixture
def play(engine: Engine) -> Callable[..., tuple[Script, EngineLoop]]:
    def play(
        *acts: object, limits: QueueLimits | None = None, warm_up: WarmUp | None = None
    ) -> tuple[Script, EngineLoop]:
        script = Script(*acts)
        loop = EngineLoop(engine, INFO, limits or QueueLimits(), script, warm_up or WarmUp(Phases()))
        try:
            loop.run()
        finally:
            for request_id in list(engine.scheduler._requests):
                engine.abort(request_id)
            while engine.has_work:
                engine.step()
        return script, loop

    return play


@pytest.fixture
def used(engine: Engine) -> Callable[[], int]:
    return lambda: engine.scheduler.stats.cache.used_blocks[0]


def test_a_request_from_submission_to_its_end(play, make_request):
    script, loop = play(Hello(), submit(make_request("r", max_tokens=3)), *[None] * 3)
    kinds = [type(message) for _, message in script.sent]
    assert kinds == [Ready, Accepted, StepEvents, StepEvents, StepEvents]
    events = script.events()
    assert [len(event.token_ids) for event in events] == [1, 1, 1]
    assert events[-1].details.finish_reason == "length"
    assert events[0].details.queue_seconds >= 0
    assert events[1].details is None
    # Hello and Submit were waited for; three steps and the one that tells the runner were not; now it waits again.
    assert script.waits == [True, True, False, False, False, True]
    load = loop.load
    assert (load.running, load.waiting, load.kv_usage, load.counters.generation_tokens) == (0, 0, 0, 3)
    assert (load.counters.requests, load.counters.prompt_tokens) == (1, 3)


def test_an_abort_takes_effect_before_the_next_step(play, used, make_request):
    seen = []

    def look() -> None:
        seen.append(used())

    request = make_request("r", max_tokens=100)
    script, loop = play(submit(request), None, look, Abort("r"), look, None)
    assert seen[0] > 0
    assert seen[1] == 0
    assert len(script.events()) == 3  # of the steps before it
    assert (loop.load.running, loop.load.waiting, loop.load.waiting_tokens) == (0, 0, 0)


def test_what_waits_can_be_aborted(play, make_request):
    submits = [submit(make_request(name, max_tokens=50)) for name in "abc"]  # two seats
    script, loop = play(submits, Abort("c"), None)
    assert {event.request_id for event in script.events()} == {"a", "b"}
    assert (loop.load.running, loop.load.waiting, loop.load.waiting_tokens) == (2, 0, 0)


def test_an_answer_is_ended_and_the_others_go_on(play, used, make_request):
    request = make_request("r", n=2, temperature=1.0, seed=1, max_tokens=6)
    script, loop = play(submit(request), *[None] * 3, EndAnswer("r", 0), *[None] * 8)
    per_answer = [[e for e in script.events() if e.index == index] for index in (0, 1)]
    assert len(per_answer[0]) < 6
    assert len(per_answer[1]) == 6
    assert per_answer[1][-1].details.finish_reason == "length"
    assert (loop.load.running, used()) == (0, 0)


def test_a_request_ends_with_its_last_answer(play, used, make_request):
    request = make_request("r", n=2, temperature=1.0, max_tokens=60)
    script, loop = play(submit(request), *[None] * 3, [EndAnswer("r", 0), EndAnswer("r", 1), EndAnswer("r", 1)], None)
    assert (loop.load.running, used()) == (0, 0)
    assert max(len([e for e in script.events() if e.index == index]) for index in (0, 1)) <= 4


def test_unknown_ids_are_ignored(play):
    script, _ = play([Abort("x"), EndAnswer("x", 0)])
    assert script.sent == []


def test_beams_can_be_aborted(play, used, make_request):
    request = make_request("r", n=2, use_beam_search=True, max_tokens=50)
    script, loop = play(submit(request), None, None, Abort("r"), None)
    assert script.events() == []
    assert (loop.load.running, used()) == (0, 0)


def test_the_queue_is_bounded(play, make_request):
    submits = [submit(make_request(name, max_tokens=2)) for name in "abcde"]
    script, _ = play(submits, *[None] * 9, limits=QueueLimits(max_requests=1))
    refused = script.only(Refused)
    assert [message.request_id for message in refused] == ["d", "e"]
    assert {message.failure.kind for message in refused} == {"QueueFullError"}
    assert {event.request_id for event in script.events()} == {"a", "b", "c"}


def test_a_resumed_request_passes_the_bound_and_is_counted_once(play, make_request):
    whole, _ = play(submit(make_request("r", max_tokens=6)), *[None] * 6)
    tokens = [token for event in whole.events() for token in event.token_ids]
    resumed = submit(make_request("r", max_tokens=6), 7, (tuple(tokens[:2]),))
    submits = [submit(make_request(name, max_tokens=9)) for name in "abc"]
    script, loop = play(submits, resumed, *[None] * 20, limits=QueueLimits(max_requests=1))
    assert not script.only(Refused)
    rest = [token for event in script.events() if event.request_id == "r" for token in event.token_ids]
    assert rest == tokens[2:]
    assert [m.seed for m in script.only(Accepted) if m.request_id == "r"] == [7]
    assert loop.load.counters.requests == 3


def test_what_the_engine_refuses_is_told_and_others_go_on(play, make_request):
    script, _ = play(
        [
            submit(make_request("good", max_tokens=2)),
            submit(make_request("good", max_tokens=2)),
            submit(make_request("long", prompt=(3,) * 300)),
            submit(make_request("empty", prompt=())),
            submit(make_request("beams", n=3, use_beam_search=True)),
        ],
        *[None] * 3,
    )
    kinds = [(message.request_id, message.failure.kind) for message in script.only(Refused)]
    assert kinds == [
        ("good", "UsageError"),
        ("long", "PromptTooLongError"),
        ("empty", "UsageError"),
        ("beams", "UsageError"),
    ]
    assert len(script.events()) == 2


def test_each_client_gets_its_own_in_one_message_a_step(play, make_request):
    submits = [
        (b"a", submit(make_request("1", max_tokens=3))),
        (b"b", submit(make_request("2", max_tokens=3))),
    ]
    script, _ = play(submits, *[None] * 3)
    assert {event.request_id for event in script.events(b"a")} == {"1"}
    assert {event.request_id for event in script.events(b"b")} == {"2"}
    together, _ = play([submit(make_request("1", max_tokens=3)), submit(make_request("2", max_tokens=3))], *[None] * 3)
    assert [len(message.events) for message in together.only(StepEvents)] == [2, 2, 2]


def test_a_request_whose_logits_are_not_finite_fails_alone(play, engine, make_request, monkeypatch):
    """What the runner reports as an error reaches the client as the request's end."""
    runner = engine.runner
    collect = runner.collect

    def broken(launched: object) -> object:
        step = collect(launched)
        return replace(step, token_ids={k: v for k, v in step.token_ids.items() if k != "bad"}, errors={"bad": "NaN"})

    monkeypatch.setattr(runner, "collect", broken)
    script, loop = play(
        [submit(make_request("bad", max_tokens=3)), submit(make_request("good", max_tokens=3))], *[None] * 3
    )
    (failed,) = [event for event in script.events() if event.request_id == "bad"]
    assert (failed.details.finish_reason, failed.details.error) == ("error", "NaN")
    assert len([event for event in script.events() if event.request_id == "good"]) == 3
    assert loop.load.running == 0


class Counting(WarmUp):
    """Three pieces, and what the loop did before each."""

    def __init__(self, happened: Callable[[], object]) -> None:
        super().__init__(Phases())
        self.left, self.happened, self.seen = 3, happened, []

    @property
    def over(self) -> bool:
        return self.left == 0

    def step(self) -> None:
        if self.left:
            self.left -= 1
            self.seen.append(self.happened())


def test_it_warms_up_while_there_is_nothing_else_to_do(engine, play, make_request):
    """Between pieces it looks for requests, and serves one that came to its end; then it waits without CPU."""
    steps = []
    warm_up = Counting(lambda: len(steps))
    step = engine.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "step", lambda: (steps.append(1), step())[1])
        script, _ = play(None, submit(make_request("r", max_tokens=3)), *[None] * 8, warm_up=warm_up)
    assert len(script.events()) == 3
    assert warm_up.seen == [0, len(steps), len(steps)]
    assert script.waits[:2] == [False, False]
    assert script.waits[-1]
    assert script.waits.count(True) == len(script.waits) - script.waits.index(True)


def test_a_client_that_is_gone_takes_its_requests_with_it(play, make_request, used):
    """Even those that arrive after the word of its end, as its messages come over another connection."""
    held = []
    script, loop = play(
        [(b"a", submit(make_request("a1", max_tokens=50))), (b"b", submit(make_request("b1", max_tokens=4)))],
        None,
        lambda: held.append(used()) or [(b"b", Forget(b"a")), (b"a", submit(make_request("a2")))],
        None,
        None,
        lambda: held.append(used()),
    )
    assert held[0] > 0
    assert held[1] == 0
    assert 0 < len(script.events(b"a")) < 5
    assert len(script.events(b"b")) == 4
    assert [m.request_id for m in script.only(Accepted)] == ["a1", "b1"]
    assert (loop.load.running, loop.load.waiting) == (0, 0)
