"""OpenTelemetry's spans, as a collector gets them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from paceline.errors import UsageError
from paceline.serve.metrics import RequestTimes
from paceline.serve.tracing import Tracer, _parts

pytest.importorskip("opentelemetry.sdk")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.paths.append(self.path)
                collector.bodies.append(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def spans(self) -> list[dict[str, Any]]:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        found = []
        for body in self.bodies:
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                service = {one.key: value_of(one.value) for one in resource.resource.attributes}["service.name"]
                for span in (one for scope in resource.scope_spans for one in scope.spans):
                    found.append(
                        {
                            "service": service,
                            "name": span.name,
                            "id": span.span_id.hex(),
                            "parent": span.parent_span_id.hex(),
                            "trace": span.trace_id.hex(),
                            "time": (span.start_time_unix_nano / 1e9, span.end_time_unix_nano / 1e9),
                            "failed": span.status.code == 2,
                            **{one.key: value_of(one.value) for one in span.attributes},
                        }
                    )
        return found


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(one) for one in value.array_value.values]
    return getattr(value, kind)


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def test_a_span_for_each_prompt_and_what_it_waited_for(serving, collector):
    import time

    before = time.time()
    secret = "the-secret-of-this-prompt"
    with serving(otlp_traces_endpoint=collector.url) as server:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        body = {"messages": [{"role": "user", "content": secret}], "max_tokens": 5, "temperature": 0, "top_p": 0.5}
        answer = server.post("/v1/chat/completions", {**body, "ignore_eos": True}, headers=headers).json()
        server.events("/v1/completions", {"prompt": ["ab", "cd"], "max_tokens": 3, "ignore_eos": True, "n": 2})
        server.chat(temperature=-1)  # refused before there is a prompt to speak of
    after = time.time()
    spans = collector.spans()
    chat = next(one for one in spans if one["name"] == "chat tiny")
    assert (chat["trace"], chat["parent"], chat["service"], chat["failed"]) == (TRACE, PARENT, "paceline", False)
    assert chat["gen_ai.operation.name"] == "chat"
    assert chat["gen_ai.response.id"] == answer["id"]
    assert chat["gen_ai.response.finish_reasons"] == ["length"]
    assert chat["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert chat["gen_ai.usage.output_tokens"] == 5
    assert (chat["gen_ai.request.max_tokens"], chat["gen_ai.request.top_p"]) == (5, 0.5)
    inside = {one["name"]: one for one in spans if one["parent"] == chat["id"]}
    assert set(inside) == {"queue", "prefill", "decode"}
    start, first, end = inside["queue"]["time"][0], inside["prefill"]["time"][1], inside["decode"]["time"][1]
    assert before <= start < first < end <= after
    assert chat["time"] == (start, end)
    assert first - start == pytest.approx(chat["gen_ai.latency.time_to_first_token"], abs=1e-5)
    assert inside["queue"]["time"][1] == inside["prefill"]["time"][0]
    prompts = [one for one in spans if one["name"] == "text_completion tiny"]
    assert [one["gen_ai.usage.output_tokens"] for one in prompts] == [6, 6]
    assert all(one["gen_ai.request.choice.count"] == 2 for one in prompts)
    assert len({one["trace"] for one in prompts}) == 2
    assert len(spans) == 3 * 4
    assert set(collector.paths) == {"/v1/traces"}
    assert secret.encode() not in b"".join(collector.bodies)


def test_a_prompt_whose_client_left(serving, collector):
    with serving(otlp_traces_endpoint=f"{collector.url}/other/path") as server:
        body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
        server.wait_for(lambda: server.service.num_in_flight == 0)
    (span,) = [one for one in collector.spans() if one["name"] == "text_completion tiny"]
    assert span["failed"]
    assert span["error.type"] == "abort"
    assert 0 < span["gen_ai.usage.output_tokens"] < 400
    assert set(collector.paths) == {"/other/path"}


def test_a_collector_that_is_not_there_costs_no_answer(serving, caplog):
    with serving(otlp_traces_endpoint="http://127.0.0.1:9") as server:
        assert server.chat().status_code == 200
    caplog.clear()  # the SDK has said so


def test_parts_as_far_as_a_prompt_came():
    assert list(_parts(RequestTimes(1.0, None, None, None, 0))) == ["queue"]
    assert list(_parts(RequestTimes(1.0, 0.5, None, None, 0))) == ["queue", "prefill"]
    parts = _parts(RequestTimes(1.0, 0.5, 2.0, 4.0, 7))
    assert [round((end - start) / 1e9, 3) for start, end in parts.values()] == [0.5, 0.5, 2.0]


@pytest.mark.parametrize("endpoint", ["grpc://localhost:4317", "localhost:4318", "http://"])
def test_what_is_no_url_of_http(endpoint):
    with pytest.raises(UsageError, match="must be a URL of OTLP over HTTP"):
        Tracer(endpoint)


def test_without_the_packages(monkeypatch, capsys):
    from paceline.cli.app import main

    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert main(["serve", "--port", "0", "--otlp-traces-endpoint", "http://localhost:4318"]) == 2
    error = 'error: --otlp-traces-endpoint needs OpenTelemetry: pip install "paceline[otel]"\n'
    assert capsys.readouterr().err == error
