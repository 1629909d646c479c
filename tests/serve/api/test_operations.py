"""Keys, probes, metrics, draining, CORS: what operators rely on."""

from __future__ import annotations

import asyncio
import ssl
import threading
from pathlib import Path

import httpx
import pytest

from paceline.errors import CheckpointError
from paceline.serve.client import EngineStatus, Startup
from paceline.serve.metrics import VLLM_NAMES
from paceline.serve.server import ListenOptions, listen, make_server
from paceline.serve.service import Service
from paceline.serve.settings import ServerSettings

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def test_models(server):
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["tiny", "tiny-alias"]
    assert listed["data"][0]["max_model_len"] == 512
    assert server.client.get("/v1/models/tiny").json() == listed["data"][0]


def test_tokenize_and_back(server):
    text = "héllo 👋 \x00"
    answer = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) == len(text.encode())
    assert answer["max_model_len"] == 512
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}
    chat = server.post("/tokenize", {"messages": CHAT["messages"]}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": chat}).json() == {"prompt": "u:hello\na:"}
    for body in ({}, {"prompt": "a", "messages": CHAT["messages"]}, {"prompt": 5}):
        assert server.post("/tokenize", body).status_code == 400
    for tokens in ([-1], [10**6], ["a"], "a", None):
        assert server.post("/detokenize", {"tokens": tokens}).status_code == 400


def test_the_key_is_asked_for_everywhere_but_at_the_probes(serving):
    with serving(api_keys=("k1", "k2"), allowed_origins=("http://page.example",)) as locked:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "k1"}, {"Authorization": "Basic k1"}):
            response = locked.client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert locked.client.post("/tokenize", json={"prompt": "a"}, headers=headers).status_code == 401
        for key in ("k1", "k2"):
            assert locked.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        for path in ("/health", "/health/live", "/health/ready", "/metrics", "/version", "/startup"):
            assert locked.client.get(path).status_code == 200, path
        asked = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
        assert locked.client.options("/v1/chat/completions", headers=asked).status_code == 200
        refused = locked.client.get("/v1/models", headers={"Origin": "http://page.example"})
        assert refused.headers["access-control-allow-origin"] == "http://page.example"


def test_cors_is_off_unless_asked_for(server):
    response = server.client.get("/v1/models", headers={"Origin": "http://page.example"})
    assert "access-control-allow-origin" not in response.headers


def test_the_request_id_comes_back(server):
    assert server.client.get("/version", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = server.client.get("/version").headers["x-request-id"]
    assert made.startswith("req-")
    for odd in ("x" * 500, "tab\tinside"):
        assert server.client.get("/version", headers={"X-Request-Id": odd}).headers["x-request-id"].startswith("req-")


class Stub:
    """An engine whose start is over when the test says so."""

    def __init__(self, error=None, phases=("resolve",)):
        self.error, self.phases = error, phases
        self.loaded = threading.Event()
        self.closed = False

    async def start(self):
        self.starting = True
        try:
            while not self.loaded.is_set():
                await asyncio.sleep(0.005)
        finally:
            self.starting = False
        if self.error is not None:
            raise self.error

    async def close(self, drain_timeout=0.0):
        self.closed = True

    def status(self):
        return EngineStatus(
            "starting", alive=True, ready=False, startup=Startup(dict.fromkeys(self.phases, 0.5), "weights")
        )


def test_while_the_model_loads_the_server_lives_and_is_not_ready(serving):
    stub = Stub()
    with serving(wait=False, client=stub) as loading:
        loading.wait_for(lambda: loading.client.get("/health/live").status_code == 200)
        for path in ("/health", "/health/ready"):
            response = loading.client.get(path)
            assert response.status_code == 503
            assert "retry-after" in response.headers
        startup = loading.client.get("/startup").json()
        assert (startup["phase"], startup["seconds"], startup["ready"]) == ("weights", {"resolve": 0.5}, False)
        response = loading.post("/v1/chat/completions", CHAT)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_loading")
        assert loading.client.get("/metrics").status_code == 200
        assert loading.client.get("/v1/models").json()["data"][0]["max_model_len"] is None
    assert stub.closed


def test_a_start_that_fails_ends_the_server_with_its_error(serving):
    stub = Stub(CheckpointError("model.gguf is cut short"))
    with serving(wait=False, client=stub) as failing:
        stub.loaded.set()
        failing.wait_for(lambda: failing.server.should_exit)
    assert str(failing.service.failure) == "model.gguf is cut short"


def test_the_tokenizer_is_read_once_the_files_are_there_beside_the_weights():
    async def start() -> None:
        read, engine = [], Stub(phases=())

        def load_tokenizer():
            read.append(len(read))
            raise CheckpointError("tokenizer.json is cut short")

        service = Service(engine, ServerSettings(("tiny",)), load_tokenizer)
        starting = asyncio.ensure_future(service.start())
        await asyncio.sleep(0.2)
        assert not read
        engine.phases = ("resolve",)
        await asyncio.wait_for(starting, 5)
        assert not engine.loaded.is_set()
        assert str(service.failure) == "tokenizer.json is cut short"
        assert not engine.starting

        failed = Service(Stub(CheckpointError("no such model"), phases=()), ServerSettings(("tiny",)), load_tokenizer)
        failed.client.loaded.set()
        await asyncio.wait_for(failed.start(), 5)
        assert (str(failed.failure), read) == ("no such model", [0])

    asyncio.run(start())


def test_an_engine_that_does_not_come_back_ends_the_server(serving, monkeypatch):
    dead = EngineStatus("dead", alive=False, ready=False, reason="the engine died 5 times within 120 s")
    with serving() as left:
        assert not left.server.should_exit
        monkeypatch.setattr(left.service.client, "status", lambda: dead)
        left.wait_for(lambda: left.server.should_exit)
    assert str(left.service.failure) == "no engine is left: the engine died 5 times within 120 s"


def test_https():
    """With a certificate of its own, which a client that trusts others refuses, and plain HTTP is not answered."""
    tls = Path(__file__).parent / "tls"  # made for this test, for a hundred years
    where = ListenOptions(port=0, ssl_certfile=str(tls / "cert.pem"), ssl_keyfile=str(tls / "key.pem"))
    service = Service(Stub(), ServerSettings(("tiny",)), lambda: None)
    with listen(where) as listener:
        port = listener.getsockname()[1]
        server = make_server(service, where)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            url = where.url_at(port) + "/health/live"
            assert url.startswith("https://127.0.0.1:")
            trusted = ssl.create_default_context(cafile=str(tls / "cert.pem"))
            assert httpx.get(url, verify=trusted).status_code == 200
            with pytest.raises(httpx.ConnectError, match="certificate"):
                httpx.get(url, verify=ssl.create_default_context())
            with pytest.raises(httpx.HTTPError):
                httpx.get(url.replace("https:", "http:"))
        finally:
            server.should_exit = True
            thread.join(20)


def test_ready_follows_the_engine_and_live_does_not(server, monkeypatch):
    stalled = EngineStatus("stalled", alive=True, ready=False, reason="nothing was heard of the engine for 4.0 s")
    monkeypatch.setattr(server.service.client, "status", lambda: stalled)
    assert server.client.get("/health/live").status_code == 200
    response = server.client.get("/health/ready")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "nothing was heard of the engine for 4.0 s"


def test_the_first_signal_drains(serving):
    import signal

    with serving(drain=20) as draining:
        body = {**CHAT, "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", draining.url + "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            draining.server.handle_exit(signal.SIGTERM, None)
            refused = draining.post("/v1/chat/completions", CHAT)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert draining.client.get("/health/ready").status_code == 503
            assert draining.client.get("/health/live").status_code == 200
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        draining.wait_for(lambda: draining.server.should_exit)


def test_answers_that_take_longer_than_the_drain_end_with_an_error(serving, monkeypatch):
    import json
    import signal
    import time

    from paceline.engine.engine import Engine

    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (time.sleep(0.05), step(self))[1])
    with serving(drain=0.2) as draining:
        body = {**CHAT, "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", draining.url + "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            draining.server.handle_exit(signal.SIGTERM, None)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["error"]["type"] == "server_error"


def metrics(server):
    """Sample -> value, its labels in the name."""
    lines = server.client.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_metrics_count_what_happened(server):
    before = metrics(server)
    answer = server.chat("hello", max_tokens=6, ignore_eos=True).json()
    server.wait_for(lambda: server.service.num_in_flight == 0)
    label = '{model_name="tiny"}'
    # The engine's own numbers come with its next beat.
    names = {"paceline_prompt_tokens_total": answer["usage"]["prompt_tokens"], "paceline_generation_tokens_total": 6}
    server.wait_for(lambda: all(metrics(server)[n + label] - before[n + label] >= v for n, v in names.items()))
    after = metrics(server)
    changes = {name: after[name] - before.get(name, 0) for name in after}
    for name, value in names.items():
        assert changes[name + label] == value
    for name in (
        "time_to_first_token_seconds",
        "request_seconds",
        "queue_seconds",
        "prefill_seconds",
        "decode_seconds",
    ):
        assert changes[f"paceline_{name}_count{label}"] == 1, name
        assert changes[f"paceline_{name}_sum{label}"] >= 0
    assert changes[f"paceline_inter_token_latency_seconds_count{label}"] == 5
    assert changes[f"paceline_request_generation_tokens_sum{label}"] == 6
    assert changes['paceline_requests_finished_total{finish_reason="length",model_name="tiny"}'] == 1
    assert after['paceline_engine_ready{model_name="tiny"}'] == 1
    http = 'paceline_http_requests_total{handler="/v1/chat/completions",method="POST",status="200"}'
    assert changes[http] == 1
    assert not any(name.startswith("vllm:") or "_created" in name for name in after)


def test_the_alias_has_vllms_names_with_the_same_values(serving):
    with serving(metrics_alias="vllm") as aliased:
        aliased.chat("hello")
        aliased.wait_for(lambda: aliased.service.num_in_flight == 0)
        found = metrics(aliased)
        text = aliased.client.get("/metrics").text
        for ours, theirs in VLLM_NAMES.items():
            assert f"# TYPE {theirs}" in text, theirs
            assert f"# TYPE {ours}" in text, ours
        assert found['vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"}'] == 1
        label = '{engine="0",model_name="tiny"}'
        assert found["vllm:time_to_first_token_seconds_count" + label] == 1
        assert found["vllm:num_requests_running" + label] == 0
        assert "vllm:prompt_tokens_total" + label in found


def test_the_openapi_document_is_whole(server):
    document = server.client.get("/openapi.json").json()
    import json

    refs = set()

    def walk(value):
        if isinstance(value, dict):
            if "$ref" in value:
                refs.add(value["$ref"])
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(document)
    assert refs
    for ref in refs:
        name = ref.removeprefix("#/components/schemas/")
        assert name in document["components"]["schemas"], ref
    fields = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"messages", "temperature", "top_k", "stop_token_ids", "max_completion_tokens"} <= set(fields)
    assert json.dumps(document)
    assert server.client.get("/docs").status_code == 200


def test_the_openapi_document_says_what_a_message_needs(server):
    """Else what is made from it is refused before anything is tried."""
    schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
    message = schemas["ChatCompletionRequest"]["properties"]["messages"]["items"]
    assert message["required"] == ["role"]
    assert message["properties"]["role"]["minLength"] == 1
    enough = {"content": "hi", "tool_calls": [{}], "reasoning_content": "hm"}
    assert message["anyOf"] == [{"required": [name]} for name in enough]
    for name, value in enough.items():
        body = {"messages": [{"role": "user", name: value}], "max_tokens": 1}
        assert server.post("/v1/chat/completions", body).status_code == 200, name
    for lacks in ({"role": "", "content": "hi"}, {"role": "user"}):
        assert server.post("/v1/chat/completions", {"messages": [lacks]}).status_code == 400


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_prompts_are_not_logged_unless_asked_for(serving, caplog, path):
    import logging

    caplog.set_level(logging.INFO, "paceline.serve")
    body = {**CHAT, "prompt": "secret words", "messages": [{"role": "user", "content": "secret words"}]}
    with serving() as quiet:
        assert quiet.post(path, body, headers={"X-Request-Id": "mine-7"}).status_code == 200
        quiet.wait_for(lambda: quiet.service.num_in_flight == 0)
    assert not any("secret words" in record.getMessage() for record in caplog.records)
    (line,) = [record.getMessage() for record in caplog.records if "prompt tokens" in record.getMessage()]
    assert line.startswith("mine-7 is c")
    assert any(message.startswith("mine-7 POST /v1/") for message in caplog.messages)
    with serving(log_prompts=True) as loud:
        assert loud.post(path, body).status_code == 200
    assert any("secret words" in record.getMessage() for record in caplog.records)
