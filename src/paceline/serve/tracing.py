"""OpenTelemetry: a span for each prompt, its waiting, prefill and decode within it, sent over OTLP/HTTP when it ends.

Attributes are those of the GenAI semantic conventions (https://opentelemetry.io/docs/specs/semconv/gen-ai/);
`gen_ai.latency.*` are vLLM's. What prompts and answers say is never sent. The packages are the extra "otel".
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from paceline.engine.output import RequestState
from paceline.errors import UsageError
from paceline.serve.metrics import RequestTimes
from paceline.serve.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.context import Context

FLUSH_SECONDS = 5.0  # that a collector has for the last spans when the server ends
_FINISHED = ("stop", "length")


class Tracer:
    """Sends spans from a thread of its own, in batches. The SDK's variables hold: OTEL_SERVICE_NAME,
    OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS and the rest."""

    def __init__(self, endpoint: str) -> None:
        """Raises UsageError where the packages are missing or `endpoint` is no URL of HTTP."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise UsageError('--otlp-traces-endpoint needs OpenTelemetry: pip install "paceline[otel]"') from None
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(
                f"--otlp-traces-endpoint '{endpoint}' must be a URL of OTLP over HTTP, as in "
                "http://localhost:4318/v1/traces"
            )
        url = endpoint if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1/traces"
        name = os.environ.get("OTEL_SERVICE_NAME", "paceline")
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": name, "service.version": VERSION}), shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(url, timeout=FLUSH_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("paceline", VERSION)
        self._read_headers = TraceContextTextMapPropagator().extract

    def prompt(self, operation: str, model: str, headers: Mapping[str, str]) -> PromptTrace:
        """A prompt has come, with its HTTP headers: `traceparent` there is the caller's span."""
        return PromptTrace(self, operation, model, self._read_headers(headers))

    def record(
        self,
        name: str,
        attributes: Mapping[str, Any],
        parent: Context,
        parts: Mapping[str, tuple[int, int]],
        failure: str | None,
    ) -> None:
        """A span and those within it, `parts`, each from and to so many nanoseconds since 1970. The span ends where the
        last of them does."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        start, end = min(one[0] for one in parts.values()), max(one[1] for one in parts.values())
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes, start_time=start)
        inside = set_span_in_context(span)
        for part, (began, ended) in parts.items():
            self._tracer.start_span(part, inside, start_time=began).end(ended)
        if failure is not None:
            span.set_attribute("error.type", failure)
            span.set_status(Status(StatusCode.ERROR, failure))
        span.end(end)

    def close(self) -> None:
        """Send what is left. Blocks for FLUSH_SECONDS at most, or little more."""
        self._provider.shutdown()


class PromptTrace:
    """One prompt's span to be."""

    def __init__(self, tracer: Tracer, operation: str, model: str, parent: Context) -> None:
        self._tracer = tracer
        self._operation = operation
        self._model = model
        self._parent = parent

    def end(self, state: RequestState, times: RequestTimes) -> None:
        """The prompt's answers have ended, or nobody waits for them any more."""
        reasons = [answer.finish_reason or "abort" for answer in state.answers]
        failure = next((reason for reason in reasons if reason not in _FINISHED), None)
        self._tracer.record(
            f"{self._operation} {self._model}",
            {**self._request(state), **_answer(state, reasons, times)},
            self._parent,
            _parts(times),
            failure,
        )

    def _request(self, state: RequestState) -> dict[str, Any]:
        params = state.params
        given = {
            "gen_ai.operation.name": self._operation,
            "gen_ai.provider.name": "paceline",
            "gen_ai.request.model": self._model,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.choice.count": params.n,
        }
        return {name: value for name, value in given.items() if value is not None}


def _answer(state: RequestState, reasons: list[str], times: RequestTimes) -> dict[str, Any]:
    given = {
        "gen_ai.response.id": state.request_id,
        "gen_ai.response.finish_reasons": reasons,
        "gen_ai.usage.input_tokens": len(state.prompt_token_ids),
        "gen_ai.usage.output_tokens": times.num_tokens,
        "gen_ai.usage.cache_read.input_tokens": state.num_cached_tokens,
        "gen_ai.latency.time_in_queue": times.queue_seconds,
        "gen_ai.latency.time_to_first_token": None if times.first is None else times.first - times.arrival,
        "gen_ai.latency.e2e": None if times.last is None else times.last - times.arrival,
    }
    return {name: value for name, value in given.items() if value is not None}


def _parts(times: RequestTimes) -> dict[str, tuple[int, int]]:
    """Queue, prefill and decode as far as they came, each from where the one before it ends."""
    bounds = [times.arrival]
    if times.queue_seconds is not None:
        bounds.append(times.arrival + times.queue_seconds)
    bounds += [time.perf_counter()] if times.first is None or times.last is None else [times.first, times.last]
    epoch = time.time() - time.perf_counter()
    # Sorted: the wait was timed in the engine, by another clock.
    nanoseconds = sorted(round(1e9 * (epoch + bound)) for bound in bounds)
    return dict(zip(("queue", "prefill", "decode"), pairwise(nanoseconds), strict=False))
