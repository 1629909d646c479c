"""The loop of an encoder, one iteration at a time: a script stands where clients are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paceline.config import SchedulerConfig
from paceline.encoders.encoder import Encoder
from paceline.encoders.inputs import Tokens
from paceline.encoders.load import find_encoder, load_encoder
from paceline.engine.load_options import LoadOptions
from paceline.phases import Phases
from paceline.serve.admission import QueueLimits
from paceline.serve.client import EncodeRequest
from paceline.serve.encoder_loop import EncoderLoop
from paceline.serve.host import encoder_info
from paceline.serve.messages import Abort, Encode, Encoded, Forget, FromEngine, Hello, Ready, Refused, Shutdown, Submit

FOX = Tokens((1, 30, 2))


class Script:
    """A Port. Each `receive` takes the next act: messages of client b"a", or of those who are named."""

    def __init__(self, *acts: object) -> None:
        self.acts: Iterator[object] = iter(acts)
        self.sent: list[tuple[bytes, FromEngine]] = []
        self.waits: list[bool] = []

    def receive(self, *, wait: bool) -> list[tuple[bytes, Any]]:
        self.waits.append(wait)
        act = next(self.acts, Shutdown())
        messages = act if isinstance(act, list) else [] if act is None else [act]
        return [one if isinstance(one, tuple) else (b"a", one) for one in messages]

    def send(self, client: bytes, message: FromEngine) -> None:
        self.sent.append((client, message))

    @property
    def answered(self) -> list[str]:
        return [message.request_id for _, message in self.sent if isinstance(message, (Encoded, Refused))]


class Recorded:
    """A transformers module that keeps the shape of each call."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.shapes: list[tuple[int, ...]] = []
        self.most_texts = 10**9

    def __call__(self, **inputs: Any) -> Any:
        self.shapes.append(tuple(inputs["input_ids"].shape))
        if len(inputs["input_ids"]) > self.most_texts:
            raise MemoryError
        return self.model(**inputs)


@pytest.fixture(scope="module")
def loaded(tiny_encoder: Path) -> Encoder:
    options = LoadOptions(str(tiny_encoder), device="cpu", dtype="float32", mode="eager", skip_tokenizer_init=True)
    source, task = find_encoder(options)
    assert source is not None
    assert task == "embed"
    return load_encoder(options, source, task).encoder


@pytest.fixture
def encoder(loaded: Encoder) -> Encoder:
    return replace(loaded, model=Recorded(loaded.model))


@pytest.fixture
def play(encoder: Encoder) -> Callable[..., tuple[Script, EncoderLoop]]:
    def play(*acts: object, budget: int = 64, texts: int = 8, **limits: Any) -> tuple[Script, EncoderLoop]:
        script, scheduler = Script(*acts), SchedulerConfig(min(texts, budget), budget)
        info = encoder_info(LoadOptions("tiny", scheduler=scheduler), encoder, Phases())
        loop = EncoderLoop(encoder, scheduler, info, QueueLimits(**limits), script)
        loop.run()
        return script, loop

    return play


def encode(name: str, *texts: Tokens, number: int = 0, resumed: bool = False) -> Encode:
    return Encode(number, EncodeRequest(name, texts or (FOX,)), resumed)


def rows(encoder: Encoder, message: FromEngine) -> np.ndarray:
    assert isinstance(message, Encoded)
    return np.frombuffer(message.rows, np.float32).reshape(-1, encoder.info.size)


def test_texts_of_all_clients_share_a_batch_and_each_gets_its_own(play, encoder):
    texts = [Tokens((1, *range(4, 4 + n), 2)) for n in (3, 9, 1, 9)]
    acts = [
        (b"a", encode("x", texts[0], texts[1])),
        (b"b", encode("y", texts[2], number=7)),
        (b"c", encode("z", texts[3])),
    ]
    script, loop = play(acts, None)
    assert encoder.model.shapes == [(4, 11)]
    assert {client: message.number for client, message in script.sent} == {b"a": 0, b"b": 7, b"c": 0}
    for client, message in script.sent:
        own = {b"a": texts[:2], b"b": texts[2:3], b"c": texts[3:]}[client]
        alone = np.concatenate([encoder.run([text]) for text in own])
        assert np.abs(rows(encoder, message) - alone).max() < 1e-5
    assert loop.load.counters.steps == 1
    assert (loop.load.counters.requests, loop.load.counters.prompt_tokens) == (3, 5 + 11 + 3 + 11)


def test_a_step_takes_a_text_of_each_request_in_turn_up_to_the_budget(play, encoder):
    """A single text does not wait behind a request of many."""
    script, _ = play([encode("many", *[FOX] * 40), encode("one")], *[None] * 20, budget=12)
    assert script.answered == ["one", "many"]
    assert encoder.model.shapes[0] == (4, 3)
    assert len(encoder.model.shapes) == 11


def test_a_text_longer_than_the_budget_runs_alone(play, encoder):
    script, _ = play([encode("x", Tokens(tuple(range(4, 24))), FOX)], None, None, budget=8)
    assert script.answered == ["x"]
    assert encoder.model.shapes == [(1, 20), (1, 3)]


def test_what_has_not_begun_is_dropped_with_its_request(play, encoder):
    script, loop = play([encode("x", *[FOX] * 6)], [Abort("x"), encode("y")], None, None, budget=6)
    assert script.answered == ["y"]
    assert encoder.model.shapes == [(2, 3), (1, 3)]
    assert (loop.load.running, loop.load.waiting, loop.load.waiting_tokens) == (0, 0, 0)
    assert script.waits[-1]
    script, _ = play(
        [(b"a", encode("x", *[FOX] * 9)), (b"b", encode("y"))], [Forget(b"a"), (b"a", encode("z"))], None, budget=6
    )
    assert script.answered == ["y"]


def test_an_id_can_be_used_again_once_its_request_is_gone(play):
    again = [Abort("x"), encode("x", number=1), encode("x", number=2)]
    script, _ = play([encode("x", *[FOX] * 9)], again, None, None, budget=3)
    assert [(type(m), m.number) for _, m in script.sent] == [(Refused, 2), (Encoded, 1)]


def test_the_queue_is_bounded_and_says_when_to_ask_again(play):
    script, loop = play([encode(name) for name in "abcd"], texts=2, max_requests=1)
    (refused,) = [m for _, m in script.sent if isinstance(m, Refused)]
    assert (refused.request_id, refused.failure.kind) == ("d", "QueueFullError")
    assert refused.failure.retry_after >= 1
    assert loop.load.waiting == 1, "two were taken by the step"
    script, _ = play([encode(name, resumed=True) for name in "abcd"], None, texts=2, max_requests=1)
    assert script.answered == ["a", "b", "c", "d"]
    script, _ = play([encode("a"), encode("b", *[FOX] * 9)], max_tokens=20)
    assert [m.failure.kind for _, m in script.sent if isinstance(m, Refused)] == ["QueueFullError"]


def test_where_memory_lacks_a_batch_is_halved(play, encoder):
    encoder.model.most_texts = 2
    script, _ = play([encode("x", *[FOX] * 5)], None)
    assert script.answered == ["x"]
    assert [shape[0] for shape in encoder.model.shapes] == [5, 2, 3, 1, 2]
    encoder.model.most_texts = 0
    script, _ = play([encode("x"), encode("y")], None)
    assert [m.failure.kind for _, m in script.sent] == ["EngineError"] * 2


def test_a_text_whose_values_are_not_finite_fails_its_request_alone(play, encoder):
    table = encoder.model.model.embeddings.word_embeddings.weight.data
    before = table[31].clone()
    table[31] = float("nan")
    try:
        script, loop = play([encode("bad", FOX, Tokens((1, 31, 2)), *[FOX] * 3), encode("good")], None, None, budget=9)
    finally:
        table[31] = before
    kinds = {message.request_id: type(message) for _, message in script.sent}
    assert kinds == {"bad": Refused, "good": Encoded}
    assert loop.load.running == 0


def test_what_no_encoder_takes_is_refused(play, make_request):
    long = Tokens((5,) * 33)
    script, loop = play([Hello(), Submit(4, make_request("g")), encode("long", long)], None)
    ready, generates, too_long = (message for _, message in script.sent)
    assert isinstance(ready, Ready)
    assert ready.info.encoder.task == "embed"
    assert (generates.failure.kind, generates.number) == ("UsageError", 4)
    assert too_long.failure.kind == "PromptTooLongError"
    assert loop.load.running == loop.load.waiting == 0
