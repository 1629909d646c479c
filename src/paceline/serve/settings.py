"""What the HTTP side is set to. The engine's own options are LoadOptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MetricsAlias = Literal["vllm"]


@dataclass(frozen=True)
class ServerSettings:
    """`served_model_names`: what requests may call the model; the first is what answers call it. `api_keys`: one of
    them must come with every request, where there are any. `max_body_bytes`: a larger body is a 413.
    `max_logprobs`: the most log probabilities a position that a request may ask for; -1 is the whole vocabulary.
    `max_answers`: the most answers of a request, its prompts times `n` (or `best_of`).
    `trust_request_chat_template`: a request may bring a template of its own, which runs in the sandbox.
    `otlp_traces_endpoint`: where OpenTelemetry's spans go. `log_prompts`: write prompts and parameters to the log; they
    never are otherwise.
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    root_path: str = ""
    max_body_bytes: int = 32 << 20
    max_logprobs: int = 20
    max_answers: int = 1024
    trust_request_chat_template: bool = False
    metrics_alias: MetricsAlias | None = None
    otlp_traces_endpoint: str | None = None
    log_prompts: bool = False
