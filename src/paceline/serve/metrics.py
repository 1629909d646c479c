"""Prometheus' /metrics: what this process times itself, and what the engine counts, asked when they are read.

Our names do not change between versions. `alias="vllm"` gives each that vLLM has too under vLLM's name beside it, so
that its dashboards and autoscalers work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from paceline.sampling.params import SamplingParams
from paceline.serve.client import EngineStatus
from paceline.serve.version import VERSION

CONTENT_TYPE = CONTENT_TYPE_LATEST

_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SECONDS = (
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
_FEW = (1, 2, 5, 10, 20)

# Family -> vLLM's name. Counters without their "_total", as prometheus_client has them.
VLLM_NAMES = {
    "paceline_requests_running": "vllm:num_requests_running",
    "paceline_requests_waiting": "vllm:num_requests_waiting",
    "paceline_kv_cache_usage_ratio": "vllm:kv_cache_usage_perc",
    "paceline_prompt_tokens": "vllm:prompt_tokens",
    "paceline_generation_tokens": "vllm:generation_tokens",
    "paceline_requests_finished": "vllm:request_success",
    "paceline_preemptions": "vllm:num_preemptions",
    "paceline_prefix_cache_query_tokens": "vllm:prefix_cache_queries",
    "paceline_prefix_cache_hit_tokens": "vllm:prefix_cache_hits",
    "paceline_draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "paceline_accepted_draft_tokens": "vllm:spec_decode_num_accepted_tokens",
    "paceline_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "paceline_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "paceline_time_per_output_token_seconds": "vllm:request_time_per_output_token_seconds",
    "paceline_request_seconds": "vllm:e2e_request_latency_seconds",
    "paceline_queue_seconds": "vllm:request_queue_time_seconds",
    "paceline_prefill_seconds": "vllm:request_prefill_time_seconds",
    "paceline_decode_seconds": "vllm:request_decode_time_seconds",
    "paceline_request_prompt_tokens": "vllm:request_prompt_tokens",
    "paceline_request_generation_tokens": "vllm:request_generation_tokens",
    "paceline_request_answers": "vllm:request_params_n",
    "paceline_request_max_tokens": "vllm:request_params_max_tokens",
}
_VLLM_LABELS = {"finish_reason": "finished_reason"}


class Metrics:
    """All of one API process; or, where PROMETHEUS_MULTIPROC_DIR was set when prometheus_client was imported, of all
    those that keep what they count there. `status`: asked for the engine's numbers at each reading."""

    def __init__(self, model_name: str, status: Callable[[], EngineStatus], alias: str | None = None) -> None:
        self._registry = CollectorRegistry()
        shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        own = self._registry if shared is None else None
        if shared is None:
            ProcessCollector(registry=self._registry)
        else:
            MultiProcessCollector(self._registry, shared)  # type: ignore[no-untyped-call]
        self._registry.register(_EngineCollector(model_name, status))
        self._alias = alias

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            made = Histogram(f"paceline_{name}", text, ["model_name"], registry=own, buckets=tuple(buckets))
            return made.labels(model_name)

        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self.inter_token = histogram("inter_token_latency_seconds", "Between two tokens of an answer.", _STEPS)
        self.per_token = histogram("time_per_output_token_seconds", "Mean of a request's later tokens.", _STEPS)
        self.end_to_end = histogram("request_seconds", "From arrival to the last token.", _SECONDS)
        self.queue = histogram("queue_seconds", "Waiting in the engine for the first step.", _SECONDS)
        self.prefill = histogram("prefill_seconds", "From the first step to the first token.", _SECONDS)
        self.decode = histogram("decode_seconds", "From the first token to the last.", _SECONDS)
        self.prompt_tokens = histogram("request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self.generation_tokens = histogram("request_generation_tokens", "Tokens that a request made.", _TOKENS)
        self.answers = histogram("request_answers", "n of a request.", _FEW)
        self.max_tokens = histogram("request_max_tokens", "max_tokens of a request, where it had one.", _TOKENS)
        self._finished = Counter(
            "paceline_requests_finished",
            "Answers that ended, by how.",
            ["model_name", "finish_reason"],
            registry=own,
        )
        self._http = Counter(
            "paceline_http_requests",
            "HTTP requests answered.",
            ["handler", "method", "status"],
            registry=own,
        )
        self._model_name = model_name
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(model_name, reason)  # a rate needs a zero to rise from

    def request(self, params: SamplingParams, num_prompt_tokens: int) -> RequestTimer:
        """A request has come."""
        self.prompt_tokens.observe(num_prompt_tokens)
        self.answers.observe(params.n)
        if params.max_tokens is not None:
            self.max_tokens.observe(params.max_tokens)
        return RequestTimer(self)

    def answer_finished(self, reason: str) -> None:
        self._finished.labels(self._model_name, reason).inc()

    def http_finished(self, handler: str, method: str, status: int) -> None:
        self._http.labels(handler, method, str(status)).inc()

    def render(self) -> bytes:
        """Prometheus' text format."""
        metrics = [_without_created(metric) for metric in self._registry.collect()]
        if self._alias is not None:
            metrics += [_renamed(metric) for metric in metrics if metric.name in VLLM_NAMES]
        shown = CollectorRegistry(auto_describe=False)
        shown.register(_Collected(metrics))
        return generate_latest(shown)


@dataclass(frozen=True)
class RequestTimes:
    """When a request came, began and had its first and last token, on time.perf_counter's clock; None where it did not
    come to that."""

    arrival: float
    queue_seconds: float | None
    first: float | None
    last: float | None
    num_tokens: int


class RequestTimer:
    """One request's times, told to the histograms as they are known."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrival = time.perf_counter()
        self._queue_seconds: float | None = None
        self._first: float | None = None
        self._lasts: dict[int, float] = {}  # answer -> when its last token came
        self._num_tokens = 0

    def update(self, index: int, num_tokens: int, queue_seconds: float | None) -> None:
        """A step's update: `num_tokens` new ones of answer `index`, which may be none."""
        if queue_seconds is not None:
            self._queue_seconds = queue_seconds
            self._metrics.queue.observe(queue_seconds)
        if not num_tokens:
            return
        now = time.perf_counter()
        if self._first is None:
            self._first = now
            self._metrics.first_token.observe(now - self._arrival)
        if index in self._lasts:
            # Several tokens at once (accepted drafts) share the time.
            self._metrics.inter_token.observe((now - self._lasts[index]) / num_tokens)
        self._lasts[index] = now
        self._num_tokens += num_tokens

    @property
    def times(self) -> RequestTimes:
        last = max(self._lasts.values(), default=None)
        return RequestTimes(self._arrival, self._queue_seconds, self._first, last, self._num_tokens)

    def finished(self, reason: str) -> None:
        """One answer has ended."""
        self._metrics.answer_finished(reason)

    def done(self) -> None:
        """All have, and none failed."""
        self._metrics.generation_tokens.observe(self._num_tokens)
        if self._first is None:
            return  # max_tokens 0
        last = max(self._lasts.values())
        self._metrics.end_to_end.observe(last - self._arrival)
        self._metrics.decode.observe(last - self._first)
        self._metrics.prefill.observe(max(0.0, self._first - self._arrival - (self._queue_seconds or 0.0)))
        if self._num_tokens > len(self._lasts):
            self._metrics.per_token.observe((last - self._first) / (self._num_tokens / len(self._lasts) - 1))


class _EngineCollector(Collector):
    def __init__(self, model_name: str, status: Callable[[], EngineStatus]) -> None:
        self._model_name = model_name
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        counters = status.counters
        gauges = {
            "requests_running": ("Requests that the engine works on.", status.running),
            "requests_waiting": ("Requests that wait for the engine.", status.waiting),
            "requests_waiting_tokens": ("Prompt tokens of those that wait.", status.waiting_tokens),
            "kv_cache_usage_ratio": ("Share of the cache that requests hold, 0 to 1.", status.kv_usage),
            "engine_ready": ("1 where a request would be worked on.", int(status.ready)),
            "engine_last_step_age_seconds": ("Since the engine's last step.", status.last_step_age or 0.0),
        }
        totals = {
            "engine_restarts": ("Times that the engine was started anew.", status.restarts),
            "engine_steps": ("Steps of the engine.", counters.steps),
            "requests_accepted": ("Requests that the engine took.", counters.requests),
            "prompt_tokens": ("Prompt tokens of requests that the engine took.", counters.prompt_tokens),
            "generation_tokens": ("Tokens that the engine made.", counters.generation_tokens),
            "preemptions": ("Requests that gave their cache back to be recomputed.", counters.preemptions),
            "prefix_cache_query_tokens": ("Tokens looked for in the prefix cache.", counters.prefix_query_tokens),
            "prefix_cache_hit_tokens": ("Tokens found there.", counters.prefix_hit_tokens),
            "draft_tokens": ("Tokens proposed by speculation.", counters.draft_tokens),
            "accepted_draft_tokens": ("Those that the model agreed with.", counters.accepted_draft_tokens),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"paceline_{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, (text, total) in totals.items():
            counter = CounterMetricFamily(f"paceline_{name}", text, labels=["model_name"])
            counter.add_metric([self._model_name], total)
            yield counter
        version = GaugeMetricFamily("paceline_build_info", "1, labelled with the version.", labels=["version"])
        version.add_metric([VERSION], 1)
        yield version


class _Collected(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def _without_created(metric: Metric) -> Metric:
    """prometheus_client adds a series to each counter and histogram that says when it was made: a third of the text,
    which nobody reads."""
    metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
    return metric


def _renamed(metric: Metric) -> Metric:
    """The same samples under vLLM's name and labels; `engine` numbers vLLM's data-parallel engines."""
    renamed = Metric(VLLM_NAMES[metric.name], metric.documentation, metric.type)
    for sample in metric.samples:
        labels = {_VLLM_LABELS.get(name, name): value for name, value in sample.labels.items()}
        renamed.samples.append(
            Sample(
                sample.name.replace(metric.name, renamed.name, 1),
                {**labels, "engine": "0"},
                sample.value,
                sample.timestamp,
                sample.exemplar,
            )
        )
    return renamed
