"""The options that commands which run a model share: sampling, engine, logging."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from paceline import __version__
from paceline.config import MODES, QUANTIZATIONS
from paceline.errors import UsageError
from paceline.loading.aliases import DEFAULT_MODEL

# Options whose names are SamplingParams' own: whatever is given goes there, and its checks are the only ones.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "min_tokens", "max_tokens")


Command = Callable[..., Any]


def with_options(command: Command, *options: Callable[[Command], Command]) -> Command:
    """The command with options in this order."""
    for option in reversed(options):
        command = option(command)
    return command


revision_option = click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="What the weights are computed in.",
)
device_option = click.option("--device", default="auto", show_default=True, metavar="NAME", help="cpu, cuda or cuda:N.")
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads [default: every core]."
)
memory_option = click.option(
    "--memory-gib", type=float, metavar="GIB", help="Take no more memory [default: what is free]."
)
offload_dir_option = click.option("--offload-dir", metavar="DIR", help="Where a file of offloaded weights may lie.")
chat_template_option = click.option(
    "--chat-template", metavar="FILE", help="A Jinja chat template in place of the model's own."
)

mode_option = click.option(
    "--mode",
    type=click.Choice(MODES),
    default="auto",
    show_default=True,
    help="How steps run: plainly (eager), as CUDA graphs (graph; auto, where it can), or so with torch.compile too.",
)

tensor_parallel_option = click.option(
    "--tensor-parallel-size",
    "-tp",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Split every matrix over N GPUs of this machine: faster.",
)
pipeline_parallel_option = click.option(
    "--pipeline-parallel-size",
    "-pp",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Split the layers over N GPUs, or N times as many: room for a larger model.",
)
deterministic_option = click.option(
    "--deterministic", is_flag=True, help="The same numbers to the bit, whatever else runs; slower."
)


def sampling_options(command: Command) -> Command:
    """Add the options that fill SamplingParams."""
    return with_options(
        command,
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
    )


def engine_options(command: Command) -> Command:
    """Add the options that say which model runs and how."""
    return with_options(
        command,
        click.option(
            "--model",
            default=DEFAULT_MODEL,
            show_default=True,
            metavar="NAME",
            help="A hub id (org/name or org/name@revision), a directory, a GGUF file or an alias.",
        ),
        revision_option,
        dtype_option,
        device_option,
        threads_option,
        click.option(
            "--quantize",
            type=click.Choice(QUANTIZATIONS),
            help="Store weights in 8 or 4 bits: smaller, not lossless. w8a8-fp8: prompts are computed in fp8 too.",
        ),
        click.option(
            "--model-impl",
            type=click.Choice(["auto", "paceline", "transformers"]),
            default="auto",
            show_default=True,
            help="Whose definition of the model runs; auto takes paceline's where it has one.",
        ),
        mode_option,
        deterministic_option,
        click.option("--max-model-len", type=int, metavar="N", help="Longest context [default: the model's own]."),
        memory_option,
        click.option("--offload", is_flag=True, help="Stream the weights, for a model larger than the device."),
        click.option(
            "--offload-to", type=click.Choice(["host", "disk"]), help="Where --offload keeps them [default: what fits]."
        ),
        offload_dir_option,
        tensor_parallel_option,
        pipeline_parallel_option,
        chat_template_option,
        click.option("--speculative", type=click.Choice(["ngram"]), help="Draft tokens ahead; the text is the same."),
    )


debug_option = click.option("--debug", is_flag=True, help="Log in detail, and show the traceback of an error.")


def given_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters that the user typed, as SamplingParams names them."""
    given = {name: options[name] for name in SAMPLING if options[name] is not None}
    if options["stop"]:
        given["stop"] = options["stop"]
    if options["ignore_eos"]:
        if options["max_tokens"] is None:
            raise UsageError("--ignore-eos needs --max-tokens: without either the answer would fill the whole context")
        given["ignore_eos"] = True
    return given


def configure_logging(debug: bool) -> None:
    """Warnings on stderr, one line each; with `debug` everything that paceline logs."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(levelname)s: %(message)s", style="%", force=True
    )
    logging.addLevelName(logging.WARNING, "warning")
    if debug:
        logging.getLogger("paceline").setLevel(logging.DEBUG)


def check_report_paths(json_path: str | None, plot_path: str | None) -> None:
    """Raises UsageError where a benchmark's JSON or figure cannot be written, before anything is measured for it."""
    if json_path not in (None, "-") and not Path(json_path).resolve().parent.is_dir():
        raise UsageError(f"--json {json_path}: there is no such directory")
    if plot_path is not None:
        from paceline.benchmark.plot import check_plot

        check_plot(plot_path)


def write_json(path: str | None, figures: Mapping[str, Any]) -> bool:
    """Write a benchmark's figures where --json asks for them, and say whether tables are to be shown: not beside a JSON
    on standard output."""
    text = json.dumps({"paceline": __version__, **figures}, indent=2)
    if path == "-":
        click.echo(text)
    elif path is not None:
        Path(path).write_text(text + "\n")
    return path != "-"
