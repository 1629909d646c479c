"""The routes of encoders, over HTTP and by the official client."""

from __future__ import annotations

import base64
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

EAGER = {"mode": "eager"}
TEXTS = ["fox", "a b c d e f g h", "jumps over . fox", "z"]


@pytest.fixture(scope="module")
def embedder(serving: Callable[..., Any], tiny_encoder: Path) -> Iterator[Any]:
    with serving(model=tiny_encoder, engine=EAGER) as running:
        yield running


@pytest.fixture(scope="module")
def cross_encoder(serving: Callable[..., Any], tiny_cross_encoder: Path) -> Iterator[Any]:
    with serving(model=tiny_cross_encoder, engine=EAGER) as running:
        yield running


def embed(server: Any, text: Any, **fields: Any) -> list[Any]:
    response = server.post("/v1/embeddings", {"input": text, **fields})
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return [one["embedding"] for one in data]


def refused(response: Any, status: int = 400) -> tuple[str | None, str]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


def test_every_form_of_input_in_its_order(embedder):
    alone = np.array([embed(embedder, text)[0] for text in TEXTS])
    assert np.abs(np.linalg.norm(alone, axis=-1) - 1).max() < 1e-6
    assert np.abs(np.array(embed(embedder, TEXTS * 5)) - np.tile(alone, (5, 1))).max() < 1e-5
    ids = [embedder.post("/tokenize", {"prompt": text}).json()["tokens"] for text in TEXTS]
    assert np.array(embed(embedder, ids)) == pytest.approx(alone, abs=1e-5)
    assert np.array(embed(embedder, ids[1])) == pytest.approx(alone[1:2], abs=1e-5)


def test_base64_is_the_same_numbers(embedder):
    numbers = embed(embedder, TEXTS)
    coded = embed(embedder, TEXTS, encoding_format="base64")
    assert [np.frombuffer(base64.b64decode(one), "<f4").tolist() for one in coded] == numbers


def test_dimensions_normalize_and_usage(embedder):
    (whole,), (raw,) = embed(embedder, "fox"), embed(embedder, "fox", normalize=False)
    (cut,) = embed(embedder, "fox", dimensions=4)
    assert cut == pytest.approx((np.array(whole[:4]) / np.linalg.norm(whole[:4])).tolist(), abs=1e-6)
    assert np.linalg.norm(raw) > 1.5
    answer = embedder.post("/v1/embeddings", {"input": ["fox", "fox jumps"], "model": "tiny-alias"}).json()
    assert answer["usage"] == {"prompt_tokens": 3 + 5, "total_tokens": 8}
    assert (answer["object"], answer["model"]) == ("list", "tiny-alias")


def test_the_official_client(embedder):
    with openai.OpenAI(base_url=embedder.url + "/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="tiny", input=TEXTS)  # asks for base64, and decodes it
        again = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float", dimensions=32)
        assert [one.embedding for one in answer.data] == [one.embedding for one in again.data] == embed(embedder, TEXTS)
        assert answer.usage.total_tokens == 3 + 10 + 7 + 3
        with pytest.raises(openai.BadRequestError, match="reads 32"):
            client.embeddings.create(model="tiny", input="fox " * 40)
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="other", input="fox")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [["a"]]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({}, "input"),
        ({"input": [99]}, None),
        ({"input": "fox " * 40}, "input"),
        ({"input": "fox", "dimensions": 33}, "dimensions"),
        ({"input": "fox", "dimensions": "4"}, "dimensions"),
        ({"input": "fox", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "fox", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "fox", "truncate_prompt_tokens": 2}, "truncate_prompt_tokens"),
        ({"input": "fox", "task": "retrieval.query"}, "task"),
    ],
)
def test_bad_input_is_a_400_that_names_it(fields, param, embedder):
    assert refused(embedder.post("/v1/embeddings", fields))[0] == param


def test_a_cut_must_be_asked_for(embedder):
    long = "fox " * 40
    assert "42 tokens" in refused(embedder.post("/v1/embeddings", {"input": long}))[1]
    assert embed(embedder, long, truncate_prompt_tokens=-1) == embed(embedder, "fox " * 30)


def test_rerank_at_all_its_paths(embedder):
    body = {"query": "fox", "documents": ["z", "fox", {"text": "over"}], "top_n": 2}
    vectors = dict(zip(["fox", "z", "over"], np.array(embed(embedder, ["fox", "z", "over"])), strict=True))
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        answer = embedder.post(path, body).json()
        first, second = answer["results"]
        assert (first["index"], first["document"]) == (1, {"text": "fox"})
        assert first["relevance_score"] == pytest.approx(1, abs=1e-6)
        best = max("z", "over", key=lambda word: float(vectors["fox"] @ vectors[word]))
        assert second["document"]["text"] == best
        assert answer["usage"]["total_tokens"] == 9
    assert "document" not in embedder.post("/rerank", {**body, "return_documents": False}).json()["results"][0]
    assert refused(embedder.post("/rerank", {**body, "top_n": 0}))[0] == "top_n"
    assert refused(embedder.post("/rerank", {**body, "documents": []}))[0] == "documents"


def test_score_of_embeddings_and_of_a_cross_encoder(embedder, cross_encoder):
    one, other = np.array(embed(embedder, ["fox", "over"]))
    for path in ("/v1/score", "/score"):
        data = embedder.post(path, {"text_1": "fox", "text_2": ["over", "fox"]}).json()["data"]
        assert [score["score"] for score in data] == pytest.approx([float(one @ other), 1], abs=1e-6)
    data = cross_encoder.post("/v1/score", {"text_1": ["fox", "z"], "text_2": ["over", "fox"]}).json()["data"]
    assert all(0 < score["score"] < 1 for score in data)
    assert data[0]["score"] != data[1]["score"]
    assert "3 texts against 2" in refused(embedder.post("/score", {"text_1": ["a"] * 3, "text_2": ["b"] * 2}))[1]
    ranked = cross_encoder.post("/v1/rerank", {"query": "fox", "documents": ["over", "z"]}).json()["results"]
    assert data[0]["score"] in [one["relevance_score"] for one in ranked]


def test_classify(cross_encoder):
    for path in ("/v1/classify", "/classify"):
        (one,) = cross_encoder.post(path, {"input": "fox"}).json()["data"]
        assert (one["label"], one["num_classes"]) == ("LABEL_0", 1)
        assert 0 < one["probs"][0] < 1


def test_routes_of_the_other_kind_of_model_say_what_it_is(server, embedder, cross_encoder):
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", {"prompt": "hi"})):
        for stream in (False, True):
            message = refused(embedder.post(path, {**body, "stream": stream}))[1]
            assert message.startswith("tiny is an encoder (BertModel) and generates nothing: use /v1/embeddings")
        assert "use /v1/classify" in refused(cross_encoder.post(path, body))[1]
    pair = {"text_1": "a", "text_2": "b"}
    for path, body in (
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/score", pair),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ("/v1/classify", {"input": "a"}),
    ):
        response = server.post(path, body)
        assert "generates text and is no encoder" in refused(response)[1]
        assert response.json()["error"]["code"] == "unsupported_task"
    assert "classifies and has no embeddings" in refused(cross_encoder.post("/v1/embeddings", {"input": "a"}))[1]
    assert "has no classes" in refused(embedder.post("/v1/classify", {"input": "a"}))[1]


def test_what_operators_see(embedder):
    assert embedder.client.get("/v1/models").json()["data"][0]["max_model_len"] == 32
    before = embedder.service.client.status().counters
    embed(embedder, TEXTS)
    embedder.wait_for(lambda: embedder.service.client.status().counters.requests == before.requests + 1)
    assert embedder.service.client.status().counters.prompt_tokens == before.prompt_tokens + 23
    text = embedder.client.get("/metrics").text
    assert 'paceline_requests_finished_total{finish_reason="stop",model_name="tiny"}' in text
    assert 'paceline_queue_seconds_count{model_name="tiny"}' in text


def test_many_clients_are_batched_together(embedder):
    expected = {text: embed(embedder, text)[0] for text in TEXTS}
    before = embedder.service.client.status().counters.steps

    def ask(index: int) -> None:
        text = TEXTS[index % len(TEXTS)]
        (found,) = embed(embedder, text)
        assert found == pytest.approx(expected[text], abs=1e-5)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(64)))
    assert 0 < embedder.service.client.status().counters.steps - before <= 64


def test_a_client_that_leaves_takes_its_request_with_it(embedder):
    body = b'{"input": [' + b",".join([b'"fox jumps over z"'] * 60_000) + b"]}"
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    status = embedder.service.client.status
    with socket.create_connection(("127.0.0.1", int(embedder.url.rpartition(":")[2]))) as client:
        client.sendall(head.encode() + body)
        embedder.wait_for(lambda: status().running == 1, 30)
    start = time.monotonic()
    embedder.wait_for(lambda: status().running == status().waiting == 0, 30)
    assert time.monotonic() - start < 5
    text = embedder.client.get("/metrics").text
    assert 'paceline_requests_finished_total{finish_reason="abort",model_name="tiny"} 1.0' in text
