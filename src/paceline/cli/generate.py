"""`paceline generate`: one prompt, its answer on stdout as it is made, and one line of figures on stderr."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from paceline.cli.model import (
    decode_figures,
    effective_sampling,
    load_model,
    start_phases,
    stream_answer,
    write_stdout,
)
from paceline.cli.options import configure_logging, debug_option, engine_options, given_sampling, sampling_options
from paceline.cli.prompt import read_prompt
from paceline.cli.report import Report, final_line, json_report
from paceline.errors import UsageError
from paceline.sampling.params import SamplingParams


@click.command()
@click.argument("prompt", nargs=-1, metavar="[PROMPT]")
@sampling_options
@engine_options
@click.option("--system", metavar="TEXT", help="A system message before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it stands: no chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.option("--quiet", is_flag=True, help="No progress and no line of figures.")
@debug_option
def generate(prompt: tuple[str, ...], **options: Any) -> None:
    """Answer PROMPT with a chat model. Without PROMPT, or with '-', the prompt is read from standard input.

    The answer goes to standard output as it is made. One line on standard error follows: time to the first token
    (TTFT), tokens a second, and the memory bandwidth used, as a share of what the device can read (MBU).
    """
    configure_logging(options["debug"])
    if len(prompt) > 1:
        raise UsageError(f'got {len(prompt)} prompts: quote the prompt, as in paceline generate "{" ".join(prompt)}"')
    text = read_prompt(prompt[0] if prompt else None)
    if options["raw"] and options["system"] is not None:
        raise UsageError("--system needs the chat template that --raw turns off: put the text into the prompt")
    if options["raw"] and options["chat_template"] is not None:
        raise UsageError("--chat-template and --raw contradict each other: give one of them")
    given = given_sampling(options)
    SamplingParams.from_dict({"max_tokens": None, **given})  # refuse a bad value now, before seconds of loading
    start = time.perf_counter()
    with load_model(options) as llm:
        loaded = time.perf_counter()
        params, sources = effective_sampling(llm, given, "paceline generate")
        request = text if options["raw"] else _messages(text, options["system"])
        answer = stream_answer(llm, request, params, _discard if options["as_json"] else write_stdout)
        model = llm.model
        report = Report(
            model=model.source.name,
            revision=model.source.revision,
            implementation=model.implementation,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            answer=answer,
            params=params,
            sources=sources,
            load_seconds=loaded - start,
            phases=start_phases(llm, answer, loaded),
            figures=decode_figures(llm, answer),
        )
    if options["as_json"]:
        write_stdout(json.dumps(json_report(report), ensure_ascii=False) + "\n")
    elif not options["quiet"]:
        click.echo(final_line(report), err=True)


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": text}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _discard(text: str) -> None:
    pass
