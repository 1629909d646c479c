"""Streams of servers, ours and others, and what they say."""

from __future__ import annotations

import json

import pytest

from paceline.benchmark.chat_stream import chat_body, read_stream
from paceline.benchmark.http_client import Response


def chunk(text: str = "", reason: str | None = None, **others: object) -> str:
    delta = {"content": text} if text else {}
    return "data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **others})


USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}'


def read(*pieces: tuple[float, str], status: int = 200):
    return read_stream(Response(status, [(at, text.encode()) for at, text in pieces]))


def test_chunks_with_text_have_the_time_of_their_last_byte():
    first, second = chunk("a") + "\n\n", chunk("b") + "\n\n"
    found = read(
        (1.0, chunk(role="assistant") + "\n\n" + first[:10]),
        (2.0, first[10:] + ": a comment\n\n" + second[:-1]),
        (3.0, "\n" + chunk("c") + "\n\n" + chunk(reason="stop") + "\n\n"),
        (4.0, USAGE + "\n\ndata: [DONE]\n\n"),
    )
    assert found.times == (2.0, 3.0, 3.0)
    assert (found.prompt_tokens, found.output_tokens, found.error) == (7, 3, None)


@pytest.mark.parametrize("cut", range(1, 8))
def test_line_ends_may_be_carriage_returns_and_cut_anywhere(cut):
    text = "\r\n\r\n".join([chunk("a"), chunk("b", "stop"), "data: [DONE]", ""])
    pieces = [text[start : start + cut] for start in range(0, len(text), cut)]
    found = read(*((float(at), piece) for at, piece in enumerate(pieces)))
    assert len(found.times) == 2
    assert found.error is None


def test_thinking_and_calls_of_tools_are_text():
    deltas = [{"reasoning_content": "hm"}, {"reasoning": "hm"}, {"tool_calls": [{"index": 0}]}, {"role": "x"}]
    lines = ["data: " + json.dumps({"choices": [{"delta": delta}]}) + "\n\n" for delta in deltas]
    found = read((1.0, "".join(lines)), (2.0, chunk(reason="stop") + "\n\n"))
    assert len(found.times) == 3
    assert found.output_tokens is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (chunk("a") + "\n\ndata: [DONE]\n\n", "ended before the answer did"),
        (chunk("a") + "\n\n", "ended before the answer did"),
        ('data: {"error": {"message": "engine died"}}\n\ndata: [DONE]\n\n', "engine died"),
        ("data: {\n\n", "no chunk of a chat: {"),
        ("data: 1\n\n", "no chunk of a chat: 1"),
    ],
)
def test_an_answer_that_is_not_whole(text, says):
    assert says in read((1.0, text)).error


def test_a_refusal_has_its_status_and_message():
    assert read((1.0, '{"error": {"message": "queue full"}}'), status=429).error == "429: queue full"
    assert read((1.0, "<html>\n bad gateway"), status=502).error == "502: <html> bad gateway"
    assert read((1.0, '{"detail": 1}'), status=400).error == '400: {"detail": 1}'


def test_the_body():
    body = json.loads(chat_body("m", "hi", 5, stream=True, ignore_eos=True))
    assert body["stream_options"] == {"include_usage": True}
    assert (body["max_tokens"], body["ignore_eos"]) == (5, True)
    assert "stream" not in json.loads(chat_body("m", "hi", 5, stream=False, ignore_eos=False))
    assert "ignore_eos" not in json.loads(chat_body("m", "hi", 5, stream=False, ignore_eos=False))
