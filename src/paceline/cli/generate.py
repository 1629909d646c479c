"""`paceline generate`: one prompt, its answer on stdout as it is made, and one line of figures on stderr."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from paceline.cli.exit_codes import EXIT_INTERRUPTED
from paceline.cli.prompt import read_prompt
from paceline.cli.report import Answer, Report, final_line, json_report
from paceline.errors import EngineError, UsageError
from paceline.loading.aliases import DEFAULT_MODEL
from paceline.sampling.params import SamplingParams

if TYPE_CHECKING:
    from paceline.benchmark.mbu import DecodeFigures
    from paceline.llm import LLM

# Options whose names are SamplingParams' own: whatever is given goes there, and its checks are the only ones.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "min_tokens", "max_tokens")
# What this command asks where neither the user nor the model's generation_config.json says anything. At
# SamplingParams' temperature of 1 the default model answers "Why is the sky blue?" with "The art of the sky and the
# Red Serenade dances"; at its authors' 0.2 it explains Rayleigh scattering.
_TEMPERATURE = 0.2
_ENGINE = ("model", "revision", "dtype", "device", "threads", "max_model_len")


def _sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.option("--max-tokens", type=int, metavar="N", help="Stop after N tokens [default: the model's own end]."),
        click.option("--min-tokens", type=int, metavar="N", help="Do not stop before N tokens."),
        click.option("--temperature", type=float, metavar="T", help="0 is greedy [default: the model's, else 0.2]."),
        click.option("--top-k", type=int, metavar="K", help="Choose among the K likeliest tokens."),
        click.option("--top-p", type=float, metavar="P", help="Choose among the likeliest tokens that make up P."),
        click.option("--min-p", type=float, metavar="P", help="Drop tokens less likely than P times the likeliest."),
        click.option("--repetition-penalty", type=float, metavar="R", help="Above 1: tokens already seen less likely."),
        click.option("--seed", type=int, metavar="N", help="The same seed gives the same text."),
        click.option("--stop", multiple=True, metavar="TEXT", help="Stop before TEXT; may be given several times."),
        click.option("--ignore-eos", is_flag=True, help="Go on past the model's own end (needs --max-tokens)."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _engine_options(command: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.option(
            "--model",
            default=DEFAULT_MODEL,
            show_default=True,
            metavar="NAME",
            help="A hub id (org/name or org/name@revision), a directory, a GGUF file or an alias.",
        ),
        click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model."),
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            default="auto",
            show_default=True,
            help="What the weights are computed in.",
        ),
        click.option("--device", default="auto", show_default=True, metavar="NAME", help="cpu, cuda or cuda:N."),
        click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads [default: every core]."),
        click.option("--quantize", type=click.Choice(["int8"]), help="Store weights in 8 bits: faster, not lossless."),
        click.option("--max-model-len", type=int, metavar="N", help="Longest context [default: the model's own]."),
        click.option("--speculative", type=click.Choice(["ngram"]), help="Draft tokens ahead; the text is the same."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("prompt", nargs=-1, metavar="[PROMPT]")
@_sampling_options
@_engine_options
@click.option("--system", metavar="TEXT", help="A system message before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it stands: no chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.option("--quiet", is_flag=True, help="No progress and no line of figures.")
@click.option("--debug", is_flag=True, help="Log in detail, and show the traceback of an error.")
def generate(prompt: tuple[str, ...], **options: Any) -> None:
    """Answer PROMPT with a chat model. Without PROMPT, or with '-', the prompt is read from standard input.

    The answer goes to standard output as it is made. One line on standard error follows: time to the first token
    (TTFT), tokens a second, and the memory bandwidth used, as a share of what the device can read (MBU).
    """
    _configure_logging(options["debug"])
    if len(prompt) > 1:
        raise UsageError(f'got {len(prompt)} prompts: quote the prompt, as in paceline generate "{" ".join(prompt)}"')
    text = read_prompt(prompt[0] if prompt else None)
    if options["raw"] and options["system"] is not None:
        raise UsageError("--system needs the chat template that --raw turns off: put the text into the prompt")
    given = _given_sampling(options)
    SamplingParams.from_dict({"max_tokens": None, **given})  # refuse a bad value now, before seconds of loading
    start = time.perf_counter()
    with _load(options) as llm:
        load_seconds = time.perf_counter() - start
        params, sources = _effective(llm, given)
        request = text if options["raw"] else _messages(text, options["system"])
        answer = _answer(llm, request, params, _discard if options["as_json"] else _write)
        model = llm.model
        report = Report(
            model=model.source.name,
            revision=model.source.revision,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            answer=answer,
            params=params,
            sources=sources,
            load_seconds=load_seconds,
            figures=_figures(llm, answer),
        )
    if options["as_json"]:
        _write(json.dumps(json_report(report), ensure_ascii=False) + "\n")
    elif not options["quiet"]:
        click.echo(final_line(report), err=True)


def _configure_logging(debug: bool) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(levelname)s: %(message)s", style="%", force=True
    )
    logging.addLevelName(logging.WARNING, "warning")
    if debug:
        logging.getLogger("paceline").setLevel(logging.DEBUG)


def _given_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters that the user typed, as SamplingParams names them."""
    given = {name: options[name] for name in _SAMPLING if options[name] is not None}
    if options["stop"]:
        given["stop"] = options["stop"]
    if options["ignore_eos"]:
        if options["max_tokens"] is None:
            raise UsageError("--ignore-eos needs --max-tokens: without either the answer would fill the whole context")
        given["ignore_eos"] = True
    return given


def _effective(llm: LLM, given: dict[str, Any]) -> tuple[SamplingParams, dict[str, str]]:
    """The parameters to run with, and where each came from that is not SamplingParams' own default."""
    ours: dict[str, Any] = {"max_tokens": None}  # to the model's own end
    _, from_model = llm.effective_sampling_params({**ours, **given})
    if not from_model:
        ours["temperature"] = _TEMPERATURE
    params, _ = llm.effective_sampling_params({**ours, **given})
    return params, {
        **dict.fromkeys(ours, "paceline generate"),
        **dict.fromkeys(from_model, "generation_config"),
        **dict.fromkeys(given, "request"),
    }


def _load(options: dict[str, Any]) -> LLM:
    with _interrupt_ends_at_once():
        from paceline.llm import LLM

    progress = None
    if sys.stderr is not None and sys.stderr.isatty() and not options["quiet"]:
        from paceline.cli.progress import TerminalProgress

        progress = TerminalProgress()
    return LLM(
        **{name: options[name] for name in _ENGINE},
        quantization=options["quantize"],
        speculative_config={"method": options["speculative"]} if options["speculative"] else None,
        max_num_seqs=1,
        progress=progress,
    )


@contextmanager
def _interrupt_ends_at_once() -> Iterator[None]:
    """Ctrl-C while torch is imported: a KeyboardInterrupt raised there is swallowed (one sent 0.6 s after the start was
    lost, and the answer came anyway). Nothing is there to clean up yet, so the process ends."""
    if threading.current_thread() is not threading.main_thread():  # only the main one may set handlers
        yield
        return
    previous = signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": text}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _discard(text: str) -> None:
    pass


def _answer(llm: LLM, request: Any, params: SamplingParams, write: Callable[[str], None]) -> Answer:
    """Generate, writing each new piece of text as it comes, and a line end after the last."""
    pieces: list[str] = []
    token_ids: list[int] = []
    num_steps = 0
    for output in llm.stream(request, params):
        new = output.outputs[0]
        num_steps += bool(new.token_ids)
        token_ids.extend(new.token_ids)
        pieces.append(new.text)
        if new.text:
            write(new.text)
    if new.error is not None:
        raise EngineError(new.error)
    text = "".join(pieces)
    if not text.endswith("\n"):
        write("\n")
    return Answer(text, tuple(token_ids), num_steps, output)


def _figures(llm: LLM, answer: Answer) -> DecodeFigures | None:
    """The decode's speed beside the device's; None where there was no decode step after the first token's."""
    metrics = answer.last.metrics
    if answer.num_steps < 2 or metrics.first_token_time is None or metrics.last_token_time is None:
        return None
    from paceline.benchmark.bandwidth import read_bandwidth
    from paceline.benchmark.mbu import DecodeFigures, decode_bytes

    stats = llm.stats()
    num_tokens = len(answer.token_ids) - 1  # the first token is the prefill's
    return DecodeFigures(
        num_tokens=num_tokens,
        seconds=metrics.last_token_time - metrics.first_token_time,
        bytes_moved=decode_bytes(
            weight_bytes=stats.step_weight_bytes,
            kv_bytes_per_token=stats.kv_bytes_per_token,
            num_steps=answer.num_steps - 1,
            first_context=len(answer.last.prompt_token_ids) + 1,
            num_tokens=num_tokens,
        ),
        bandwidth=read_bandwidth(llm.model.device),
    )
