"""The options of `paceline serve`: vLLM's names where they mean the same, a variable for each, and a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from paceline.cli.options import (
    Command,
    chat_template_option,
    deterministic_option,
    device_option,
    dtype_option,
    memory_option,
    mode_option,
    offload_dir_option,
    pipeline_parallel_option,
    revision_option,
    tensor_parallel_option,
    threads_option,
    with_options,
)
from paceline.config import LOAD_FORMATS, MODEL_IMPLS, OFFLOADS, QUANTIZATIONS
from paceline.errors import UsageError
from paceline.loading.aliases import DEFAULT_MODEL
from paceline.registry import unknown

ENVIRONMENT = "PACELINE_SERVE"  # not PACELINE: Kubernetes sets PACELINE_PORT for a service that is called paceline


class _Json(click.ParamType[Any]):
    """A JSON value of one kind, as vLLM's flags take it."""

    def __init__(self, kind: type, name: str) -> None:
        self._kind = kind
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                self.fail(f"'{value}' is not JSON", param, ctx)
        if not isinstance(value, self._kind):
            self.fail(f"{value!r} is not a JSON {self.name}", param, ctx)
        return value


class _Strings(click.ParamType[Any]):
    """A string, or a JSON list of strings: vLLM's --allowed-origins '["a", "b"]'."""

    name = "strings"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, (list, tuple)):
            return tuple(str(item) for item in value)
        if not value.startswith("["):
            return tuple(item.strip() for item in value.split(",") if item.strip())
        return tuple(str(item) for item in _Json(list, "list").convert(value, param, ctx))


def _read_config(context: click.Context, _: click.Parameter, path: str | None) -> None:
    """Make the file's values the defaults: the environment and flags come before them."""
    if path is None:
        return
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config '{path}' cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"--config '{path}' is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"--config '{path}' must hold options by name, as in 'port: 8000'")
    known = {param.name: param for param in context.command.params if param.name not in (None, "config")}
    defaults = {}
    for key, value in values.items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in known:
            raise UsageError(f"--config '{path}': {unknown('option', str(key), [str(name) for name in known])}")
        wanted = known[name]
        if wanted.multiple and not isinstance(value, list):
            value = [value]
        elif isinstance(value, (list, dict)) and not isinstance(wanted.type, (_Json, _Strings)) and not wanted.multiple:
            raise UsageError(f"--config '{path}': {key} takes one value, got {value!r}")
        defaults[name] = value
    # A MODEL in the file must not stand in the way of one on the command line.
    context.default_map = defaults


def serve_options(command: Command) -> Command:
    """All options of `paceline serve`, whose context gives each its variable (ENVIRONMENT)."""
    return with_options(model_and_engine_options(command), *_server_options())


def model_and_engine_options(command: Command) -> Command:
    """Those that say which model runs and how, as cli/load_options.py reads them."""
    return with_options(command, *_model_options(), *_engine_options())


def _server_options() -> list[Callable[..., Any]]:
    return [
        click.option(
            "--config",
            is_eager=True,
            expose_value=False,
            callback=_read_config,
            metavar="FILE",
            help="A YAML file of these options, by name; flags and environment win.",
        ),
        click.option(
            "--host",
            default="127.0.0.1",
            show_default=True,
            metavar="ADDRESS",
            help="Where to listen; 0.0.0.0 is everywhere.",
        ),
        click.option(
            "--port",
            default=8000,
            show_default=True,
            type=click.IntRange(0, 65535),
            metavar="N",
            help="The port; 0 takes a free one.",
        ),
        click.option(
            "--api-workers",
            "--api-server-count",
            "api_workers",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            metavar="N",
            help="Processes that answer HTTP, all before one engine.",
        ),
        click.option(
            "--api-key", multiple=True, metavar="KEY", help="Refuse requests without it; may be given several times."
        ),
        click.option(
            "--served-model-name",
            multiple=True,
            metavar="NAME",
            help="What requests call the model [default: as it was given].",
        ),
        click.option(
            "--allowed-origins",
            type=_Strings(),
            default="",
            metavar="LIST",
            help="Origins of web pages that may ask (CORS).",
        ),
        click.option(
            "--allowed-methods", type=_Strings(), default="*", metavar="LIST", help="HTTP methods that they may use."
        ),
        click.option(
            "--allowed-headers", type=_Strings(), default="*", metavar="LIST", help="HTTP headers that they may send."
        ),
        click.option("--allow-credentials", is_flag=True, help="They may send cookies."),
        click.option("--ssl-certfile", metavar="FILE", help="Serve HTTPS with this certificate."),
        click.option("--ssl-keyfile", metavar="FILE", help="The certificate's key, where it is in a file of its own."),
        click.option("--ssl-keyfile-password", metavar="TEXT", help="The password of the key."),
        click.option("--root-path", default="", metavar="PATH", help="The path that a proxy in front adds."),
        click.option(
            "--max-queue",
            "--max-num-queued-reqs",
            "max_queue",
            type=click.IntRange(min=0),
            default=512,
            show_default=True,
            metavar="N",
            help="Requests that may wait; more are a 429.",
        ),
        click.option(
            "--max-queue-tokens",
            "--max-num-queued-tokens",
            "max_queue_tokens",
            type=click.IntRange(min=0),
            metavar="N",
            help="Prompt tokens that may wait [default: any].",
        ),
        click.option(
            "--max-logprobs",
            type=click.IntRange(min=-1),
            default=20,
            show_default=True,
            metavar="K",
            help="The most log probabilities a token that a request may ask for; -1 is any.",
        ),
        click.option(
            "--max-body-bytes",
            type=click.IntRange(min=1),
            default=32 << 20,
            show_default=True,
            metavar="N",
            help="The largest body of a request.",
        ),
        click.option(
            "--drain-timeout",
            type=click.FloatRange(min=0),
            default=30.0,
            show_default=True,
            metavar="S",
            help="Seconds that answers may still take after SIGTERM.",
        ),
        click.option(
            "--metrics-alias", type=click.Choice(["vllm"]), help="Give /metrics vLLM's names too, for its dashboards."
        ),
        click.option(
            "--otlp-traces-endpoint", metavar="URL", help="Send OpenTelemetry traces there, as OTLP over HTTP."
        ),
        click.option("--trust-request-chat-template", is_flag=True, help="A request may bring its own chat template."),
        click.option("--log-requests", is_flag=True, help="Log a line for each request."),
        click.option("--log-prompts", is_flag=True, help="Log what requests say, too."),
        click.option(
            "--uvicorn-log-level",
            type=click.Choice(["critical", "error", "warning", "info", "debug", "trace"]),
            default="warning",
            show_default=True,
            help="How much uvicorn logs.",
        ),
    ]


def _model_options() -> list[Callable[..., Any]]:
    return [
        click.option("--model", default=DEFAULT_MODEL, show_default=True, metavar="NAME", help="The same as MODEL."),
        click.option("--tokenizer", metavar="NAME", help="Where the tokenizer is, if not with the model."),
        revision_option,
        dtype_option,
        device_option,
        click.option(
            "--quantization",
            "-q",
            "--quantize",
            "quantization",
            type=click.Choice(QUANTIZATIONS),
            help="Store weights in 8 or 4 bits: smaller, not lossless.",
        ),
        click.option(
            "--load-format",
            type=click.Choice(LOAD_FORMATS),
            default="auto",
            show_default=True,
            help="dummy makes random weights of the model's shape.",
        ),
        click.option("--download-dir", metavar="DIR", help="Where models are kept [default: the hub's cache]."),
        click.option(
            "--model-impl",
            type=click.Choice(MODEL_IMPLS),
            default="auto",
            show_default=True,
            help="Whose definition of the model runs.",
        ),
        chat_template_option,
        click.option(
            "--generation-config",
            type=click.Choice(["auto", "none", "vllm"]),
            default="auto",
            show_default=True,
            help="auto takes the model's sampling defaults; none (vLLM's word: vllm) does not.",
        ),
        click.option("--trust-remote-code", is_flag=True, help="Refused: no code of a checkpoint is ever run."),
    ]


def _engine_options() -> list[Callable[..., Any]]:
    return [
        click.option(
            "--max-model-len",
            type=click.IntRange(min=1),
            metavar="N",
            help="Longest context [default: the model's own].",
        ),
        click.option(
            "--max-num-seqs",
            type=click.IntRange(min=1),
            default=64,
            show_default=True,
            metavar="N",
            help="Requests of one step.",
        ),
        click.option(
            "--max-num-batched-tokens",
            type=click.IntRange(min=1),
            default=2048,
            show_default=True,
            metavar="N",
            help="Tokens of one step.",
        ),
        click.option(
            "--scheduling-policy",
            type=click.Choice(["fcfs", "priority"]),
            default="fcfs",
            show_default=True,
            help="Who is served first.",
        ),
        click.option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            default=True,
            show_default=True,
            help="Keep and share the keys and values of prompts.",
        ),
        click.option(
            "--block-size",
            type=click.IntRange(min=1),
            default=16,
            show_default=True,
            metavar="N",
            help="Tokens of one block of the cache.",
        ),
        click.option("--kv-cache-gib", type=float, metavar="GIB", help="The cache's size [default: what is free]."),
        memory_option,
        click.option(
            "--offload",
            type=click.Choice(OFFLOADS),
            help="Stream the weights, for a model larger than the device.",
        ),
        offload_dir_option,
        tensor_parallel_option,
        pipeline_parallel_option,
        click.option(
            "--speculative-config",
            type=_Json(dict, "object"),
            metavar="JSON",
            help='Draft tokens ahead, as {"method": "ngram"}.',
        ),
        mode_option,
        click.option("--enforce-eager", is_flag=True, help="The same as --mode eager."),
        deterministic_option,
        click.option(
            "--seed", type=int, default=0, show_default=True, metavar="N", help="For requests that bring none."
        ),
        threads_option,
    ]
