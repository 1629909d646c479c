"""Load on a server, from outside: streaming chats that come whether or not earlier ones are done (open loop), at the
times of a Poisson process. No torch, and any server of OpenAI's API.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from paceline.benchmark.chat_stream import chat_body, error_text, read_stream
from paceline.benchmark.http_client import HttpClient
from paceline.benchmark.serve_figures import Outcome, Round, Slo, summarize
from paceline.benchmark.words import NUM_IDS, PROBES, Scale, in_words, text_of
from paceline.benchmark.workload import Workload, draw_asks
from paceline.errors import EngineError, UsageError

SILENCE = 600.0  # seconds that one answer may take; then it counts as an error


@dataclass(frozen=True)
class Options:
    """`model` None takes the first that the server names. `rates`: requests a second, a round each; infinity sends all
    at once. `warmup`: requests sent at once before the first round, which count nowhere. `ignore_eos`: ask for answers
    of their whole length."""

    url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    workload: Workload = field(default_factory=Workload)
    rates: tuple[float, ...] = (math.inf,)
    slo: Slo | None = None
    warmup: int = 8
    ignore_eos: bool = True

    def __post_init__(self) -> None:
        if not self.rates:
            raise UsageError("no rate is given: name one, in requests a second")
        for rate in self.rates:
            if not rate > 0:
                raise UsageError(f"a rate must be greater than 0 requests a second, got {rate}")
        if self.warmup < 0:
            raise UsageError(f"warmup must be at least 0, got {self.warmup}")


@dataclass(frozen=True)
class Report:
    """`scale`: how the prompts' tokens were aimed at; what they had is in the rounds. `counted_by_server`: whether
    token counts are the server's; else each chunk counts as one."""

    url: str
    model: str
    workload: Workload
    slo: Slo | None
    scale: Scale
    counted_by_server: bool
    rounds: tuple[Round, ...]


def run(options: Options, *, tell: Callable[[str], None] = lambda line: None) -> Report:
    """Measure each rate, one after the other. `tell` hears a line before and after each. Raises UsageError for what
    could not be right or what the server refuses, and EngineError where it cannot be reached or answers nothing."""
    return asyncio.run(_run(options, tell))


async def _run(options: Options, tell: Callable[[str], None]) -> Report:
    client = HttpClient(options.url, options.api_key)
    try:
        model = options.model or await _first_model(client)
        options = replace(options, model=model)
        scale = await _probe(client, options)
        words = in_words(options.workload, scale)
        if options.warmup:
            tell(f"{model} at {client.url}: warming up with {options.warmup} requests ...")
            outcomes, _ = await _send_all(client, options, replace(words, num_requests=options.warmup), -1, math.inf)
            _refuse_if_none_answered(outcomes)
        rounds = []
        for index, rate in enumerate(options.rates):
            tell(f"{rate:g} requests/s: {words.num_requests} requests ...")
            outcomes, seconds = await _send_all(client, options, words, index, rate)
            _refuse_if_none_answered(outcomes)
            rounds.append(summarize(rate, seconds, outcomes, options.slo))
            tell(f"{rate:g} requests/s: {rounds[-1].output_rate:,.0f} tok/s (measured in {seconds:.0f} s)")
    finally:
        client.close()
    counted = all(one.counted for each in rounds for one in each.outcomes if one.error is None)
    return Report(client.url, model, options.workload, options.slo, scale, counted, tuple(rounds))


def arrivals(num_requests: int, rate: float, seed: int) -> list[float]:
    """Seconds after the start at which each is due: those of a Poisson process, the first at 0."""
    draw = random.Random(f"arrivals {seed}")
    due, now = [], 0.0
    for _ in range(num_requests):
        due.append(now)
        now += 0.0 if math.isinf(rate) else draw.expovariate(rate)
    return due


async def _send_all(
    client: HttpClient, options: Options, words: Workload, round_index: int, rate: float
) -> tuple[Sequence[Outcome], float]:
    """The outcomes of a round, in the order of their requests, and the seconds until the last of them."""
    asks = draw_asks(words, NUM_IDS, round_index)
    assert options.model is not None
    bodies = [
        chat_body(options.model, text_of(ask.prompt), ask.num_tokens, stream=True, ignore_eos=options.ignore_eos)
        for ask in asks
    ]
    start = time.perf_counter()
    due = arrivals(len(bodies), rate, words.seed)
    sent = [asyncio.ensure_future(_send(client, body, start, at)) for body, at in zip(bodies, due, strict=True)]
    try:
        outcomes = await asyncio.gather(*sent)
    finally:
        for one in sent:
            one.cancel()
    return outcomes, time.perf_counter() - start


async def _send(client: HttpClient, body: bytes, start: float, due: float) -> Outcome:
    await asyncio.sleep(start + due - time.perf_counter())
    sent = time.perf_counter() - start
    try:
        response = await asyncio.wait_for(client.request("POST", "/v1/chat/completions", body), SILENCE)
    except (OSError, asyncio.TimeoutError) as error:  # since Python 3.11 the second is one of the first
        return Outcome(due, sent, error=str(error) or f"no whole answer within {SILENCE:.0f} s")
    stream = read_stream(response)
    return Outcome(
        due,
        sent,
        tuple(at - start for at in stream.times),
        stream.prompt_tokens,
        len(stream.times) if stream.output_tokens is None else stream.output_tokens,
        stream.output_tokens is not None,
        stream.error,
    )


async def _first_model(client: HttpClient) -> str:
    names = (await _ask(client, "GET", "/v1/models")).get("data") or [{}]
    name = names[0].get("id")
    if name is None:
        raise UsageError(f"{client.url} names no model: give one with --model")
    return str(name)


async def _probe(client: HttpClient, options: Options) -> Scale:
    """Ask two short questions, which also tell whether the server takes requests of this form at all."""
    assert options.model is not None
    tokens = []
    for index, num_words in enumerate(PROBES):
        # Rounds of their own, or the first of a round would find the longer one in the prefix cache.
        (ask,) = draw_asks(Workload(1, num_words, 1, seed=options.workload.seed), NUM_IDS, -2 - index)
        body = chat_body(options.model, text_of(ask.prompt), 1, stream=False, ignore_eos=options.ignore_eos)
        answer = await _ask(client, "POST", "/v1/chat/completions", body)
        tokens.append((answer.get("usage") or {}).get("prompt_tokens", 0))
    return Scale.of_probes(tokens)


async def _ask(client: HttpClient, method: str, path: str, body: bytes = b"") -> Any:
    try:
        response = await asyncio.wait_for(client.request(method, path, body), SILENCE)
    except (OSError, asyncio.TimeoutError) as error:
        raise EngineError(f"{client.url} cannot be asked: {error or type(error).__name__}") from None
    said = error_text(response.body)
    if 400 <= response.status < 500:
        raise UsageError(f"{client.url}{path} answers {response.status}: {said}")
    if response.status != 200:
        raise EngineError(f"{client.url}{path} answers {response.status}: {said}")
    try:
        value = json.loads(response.body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise EngineError(f"{client.url}{path} answers no JSON object: {said}")
    return value


def _refuse_if_none_answered(outcomes: Sequence[Outcome]) -> None:
    errors = [one.error for one in outcomes if one.error is not None]
    if len(errors) == len(outcomes):
        raise EngineError(f"none of {len(outcomes)} requests was answered; the first: {errors[0]}")
