"""`paceline serve`: an OpenAI-compatible server of one model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from paceline.cli.load_options import load_options, text_options
from paceline.cli.model import interrupt_ends_at_once
from paceline.cli.options import configure_logging, debug_option
from paceline.cli.serve_options import ENVIRONMENT, serve_options
from paceline.cli.table import columns
from paceline.errors import UsageError
from paceline.host import process_age

if TYPE_CHECKING:
    from paceline.serve.client import ModelInfo
    from paceline.serve.settings import ServerSettings


@click.command(context_settings={"auto_envvar_prefix": ENVIRONMENT})
@click.argument("name", required=False, metavar="[MODEL]")
@serve_options
@debug_option
@click.pass_context
def serve(context: click.Context, /, name: str | None, **options: Any) -> None:
    """Serve MODEL, a hub id, a directory, a GGUF file or an alias, to any client of OpenAI's API.

    Every option has an environment variable: --max-model-len is PACELINE_SERVE_MAX_MODEL_LEN. SIGTERM and Ctrl-C let
    running answers finish, for up to --drain-timeout; a second one ends at once.
    """
    configure_logging(options["debug"])
    if options["log_requests"] or options["log_prompts"]:
        logging.getLogger("paceline.serve").setLevel(logging.INFO)
    if name is not None:
        if context.get_parameter_source("model") is ParameterSource.COMMANDLINE:
            raise UsageError(f"two models: '{name}' and --model '{options['model']}'; give one of them")
        options["model"] = name
    if any(not key for key in options["api_key"]):
        raise UsageError("--api-key is empty: give a key, or leave it out to let everyone in")
    load = load_options(options)
    with interrupt_ends_at_once():
        import asyncio

        from paceline.serve.admission import QueueLimits
        from paceline.serve.server import ListenOptions, listen, listen_shared, run_server
        from paceline.serve.service import Service
        from paceline.serve.worker_server import WorkerOptions
        from paceline.serve.workers import Workers
        from paceline.serve.zmq_client import ZmqClient, supervised

    where = ListenOptions(
        options["host"],
        options["port"],
        options["ssl_certfile"],
        options["ssl_keyfile"],
        options["ssl_keyfile_password"],
        "debug" if options["debug"] else options["uvicorn_log_level"],
        options["drain_timeout"],
    )
    settings = _settings(options)
    text = text_options(load)
    limits = QueueLimits(options["max_queue"], options["max_queue_tokens"])
    log_level = logging.DEBUG if options["debug"] else logging.WARNING
    count = options["api_workers"]
    with ExitStack() as stack:
        listeners = [listen(where)] if count == 1 else listen_shared(where, count)
        for listener in listeners:
            stack.enter_context(listener)
        url = where.url_at(listeners[0].getsockname()[1])
        told = f"{load.model} on {url}/v1: loading; {url}/startup says how far"
        if count == 1:
            client = ZmqClient(supervised(load, limits=limits, threads=options["threads"], log_level=log_level))
            service = Service(client, settings, text.load, _tell_ready)
            click.echo(told, err=True)
            run_server(service, where, listeners[0])
        else:
            api = WorkerOptions(settings, text, where)
            workers = Workers(load, api, listeners, limits=limits, threads=options["threads"], log_level=log_level)
            click.echo(told, err=True)
            asyncio.run(workers.run(_tell_ready))


def _tell_ready(info: ModelInfo) -> None:
    """Where the time of the start went."""
    age = process_age()
    rows = [[name, f"{seconds:.2f} s"] for name, seconds in info.phases.items()]
    click.echo(f"ready{'' if age is None else f' after {age:.1f} s'}; the engine's share:\n{columns(rows)}", err=True)
    if info.encoder is None:
        told = (
            f"a context of {info.max_model_len} tokens, {info.max_num_seqs} requests at once, "
            f"a cache of {info.num_kv_tokens} tokens"
        )
    else:
        told = f"an encoder of texts of up to {info.max_model_len} tokens ({info.encoder.task})"
    click.echo(f"{info.dtype} on {info.device}, {told}", err=True)


def _settings(options: Mapping[str, Any]) -> ServerSettings:
    from paceline.serve.settings import ServerSettings

    same = [
        "allowed_origins",
        "allowed_methods",
        "allowed_headers",
        "allow_credentials",
        "root_path",
        "max_body_bytes",
        "max_logprobs",
        "trust_request_chat_template",
        "metrics_alias",
        "otlp_traces_endpoint",
        "log_prompts",
    ]
    return ServerSettings(
        served_model_names=options["served_model_name"] or (options["model"],),
        api_keys=options["api_key"],
        **{name: options[name] for name in same},
    )
