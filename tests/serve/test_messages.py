"""What crosses the process boundary arrives as it was sent."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline import errors
from paceline.engine.step import RequestUpdate
from paceline.errors import EngineDeadError, PacelineError, QueueFullError
from paceline.sampling.logprobs import TokenLogprobs
from paceline.sampling.params import SamplingParams
from paceline.serve.client import EngineCounters, GenerateRequest, ModelInfo, Startup, Transfer
from paceline.serve.failures import error_of, failure_of
from paceline.serve.messages import (
    Abort,
    Accepted,
    Beat,
    EndAnswer,
    Failure,
    Hello,
    Load,
    LoadFailed,
    Ready,
    Refused,
    Shutdown,
    StepEvents,
    Submit,
    decode_beat,
    decode_from_engine,
    decode_to_engine,
    encode,
    event_of,
    update_of,
)

tokens = st.integers(0, 2**40)
token_tuples = st.lists(tokens, max_size=5).map(tuple)
texts = st.text(max_size=8)
floats = st.floats(allow_nan=False)
seconds = st.floats(0, 1e6)

params = st.builds(
    SamplingParams,
    n=st.integers(1, 4),
    temperature=st.floats(0.1, 5),
    top_k=st.integers(-1, 100),
    logit_bias=st.none() | st.dictionaries(tokens, st.floats(-100, 100), max_size=3),
    allowed_token_ids=st.none() | st.lists(tokens, min_size=1, max_size=3),
    bad_words=st.lists(st.text(min_size=1, max_size=5), max_size=2),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    max_tokens=st.none() | st.integers(1, 2**31),
    stop=st.text(min_size=1, max_size=5) | st.lists(st.text(min_size=1, max_size=5), max_size=2),
    stop_token_ids=token_tuples,
    logprobs=st.none() | st.integers(-1, 5),
    priority=st.integers(-(2**31), 2**31),
)
beam_params = st.builds(
    SamplingParams, n=st.just(2), use_beam_search=st.just(True), early_stopping=st.sampled_from([True, False, "never"])
)
requests = st.builds(
    GenerateRequest,
    request_id=texts,
    prompt_token_ids=token_tuples,
    params=params | beam_params,
    eos_token_ids=st.frozensets(tokens, max_size=3),
    bad_words_token_ids=st.lists(token_tuples, max_size=2).map(tuple),
    namespace=texts,
)
to_engine = st.one_of(
    st.builds(Hello),
    st.builds(Shutdown),
    st.builds(Abort, texts),
    st.builds(EndAnswer, texts, st.integers(0, 9)),
    st.builds(
        Submit,
        st.integers(0, 2**40),
        requests,
        st.none() | st.integers(0, 2**64 - 1),
        st.none() | st.lists(st.none() | token_tuples, max_size=3).map(tuple),
    ),
)
entries = st.builds(
    TokenLogprobs, tokens, floats, st.integers(1, 100), st.dictionaries(tokens, st.floats(max_value=0), max_size=3)
)
entry_tuples = st.lists(entries, max_size=2).map(tuple)
updates = st.builds(
    RequestUpdate,
    request_id=texts,
    new_token_ids=token_tuples,
    logprobs=entry_tuples,
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
    stop_reason=st.none() | tokens | texts,
    error=st.none() | texts,
    num_cached_tokens=st.integers(0, 2**31),
    prompt_logprobs=st.none() | entry_tuples,
    score=st.none() | floats,
    cumulative_logprob=st.none() | floats,
)
events = st.builds(event_of, texts, st.integers(0, 9), updates, st.none() | seconds)
infos = st.builds(
    ModelInfo,
    model=texts,
    vocab_size=tokens,
    max_model_len=tokens,
    max_num_seqs=tokens,
    dtype=texts,
    device=texts,
    quantization=st.none() | texts,
    generation_config=st.dictionaries(texts, st.none() | tokens | texts | st.lists(tokens, max_size=2), max_size=3),
    num_kv_tokens=tokens,
    phases=st.dictionaries(texts, seconds, max_size=2),
)
failures = st.builds(Failure, texts, texts, seconds)
from_engine = st.one_of(
    st.builds(Ready, infos),
    st.builds(LoadFailed, failures),
    st.builds(Accepted, texts, st.integers(0, 2**40), st.integers(0, 2**64 - 1)),
    st.builds(Refused, texts, st.integers(0, 2**40), failures),
    st.builds(StepEvents, st.lists(events, max_size=3)),
)
beats = st.builds(
    Beat,
    st.builds(
        Startup,
        st.dictionaries(texts, seconds, max_size=2),
        st.none() | texts,
        st.none() | st.builds(Transfer, texts, tokens, tokens),
    ),
    st.builds(Load, tokens, tokens, tokens, seconds, st.builds(EngineCounters, steps=tokens, draft_tokens=tokens)),
    st.none() | seconds,
    st.none() | seconds,
)


@given(to_engine)
def test_what_is_told_to_the_engine(message):
    assert decode_to_engine(encode(message)) == message


@given(from_engine)
def test_what_the_engine_tells(message):
    assert decode_from_engine(encode(message)) == message


@given(beats)
def test_beats(beat):
    assert decode_beat(encode(beat)) == beat


@given(updates, st.integers(0, 9), st.none() | seconds)
def test_an_update_is_the_same_on_the_other_side(update, index, queue_seconds):
    (event,) = decode_from_engine(
        encode(StepEvents([event_of(update.request_id, index, update, queue_seconds)]))
    ).events
    arrived = update_of(event)
    assert (arrived.index, arrived.update, arrived.queue_seconds) == (index, update, queue_seconds)


def test_values_that_are_no_numbers_arrive():
    entry = TokenLogprobs(3, math.nan, 1, {4: -math.inf})
    (event,) = decode_from_engine(
        encode(StepEvents([event_of("a", 0, RequestUpdate("a", (3,), (entry,)), None)]))
    ).events
    (arrived,) = update_of(event).update.logprobs
    assert math.isnan(arrived.logprob)
    assert arrived.top == {4: -math.inf}


def test_a_plain_token_is_a_short_message():
    """An id of 24 characters, a place, a token, a count: the details that it does not have take one byte."""
    event = event_of("x" * 24, 0, RequestUpdate("x" * 24, (50_000,), num_cached_tokens=300), None)
    assert len(encode(event)) < 40


@pytest.mark.parametrize(
    "error", [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PacelineError)]
)
def test_an_error_keeps_its_class_and_its_line(error):
    made = error("what to do", 2.5) if error is QueueFullError else error("what to do")
    arrived = error_of(failure_of(made))
    assert type(arrived) is error
    assert str(arrived) == "what to do"
    assert getattr(arrived, "retry_after", 2.5) == 2.5


def test_an_error_of_no_class_of_ours_is_an_engines_death():
    for kind in ("KeyError", "is_out_of_memory", "__name__"):
        assert isinstance(error_of(Failure(kind, "x")), EngineDeadError)
