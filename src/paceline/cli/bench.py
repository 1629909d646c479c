"""`paceline bench`: measure this machine, by a protocol that is the same for every engine."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click

from paceline import __version__
from paceline.benchmark.latency import Options, run
from paceline.benchmark.protocol import PROMPT
from paceline.cli.group import NearestGroup
from paceline.cli.options import configure_logging, debug_option, mode_option
from paceline.config import QUANTIZATIONS
from paceline.errors import EngineError, UsageError


@click.group(cls=NearestGroup)
def bench() -> None:
    """Measure how fast models run here, with random weights of their true shapes."""


@bench.command()
@click.argument("shape", default="smollm2-135m")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="What it is computed in; auto is the dtype that the model is published in.",
)
@click.option(
    "--quantize",
    multiple=True,
    type=click.Choice(["none", *QUANTIZATIONS]),
    help="How weights are stored; several are a row each [default: none].",
)
@click.option(
    "--context", type=int, multiple=True, metavar="N", help=f"Tokens of the prompt; several [default: {PROMPT}]."
)
@click.option("--rounds", type=int, default=5, show_default=True, metavar="N", help="Figures are medians of N.")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="cpu, cuda or cuda:N.")
@mode_option
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads [default: every core].")
@click.option(
    "--against",
    multiple=True,
    metavar="ENGINE",
    help="transformers, or gpt-fast=DIR, a checkout of it: measured in the same run; several.",
)
@click.option("--json", "json_path", metavar="FILE", help="Write every figure there, '-' for standard output.")
@click.option("--plot", "plot_path", metavar="FILE", help="Draw tokens/s and their roof there (needs matplotlib).")
@click.option("--quiet", is_flag=True, help="No lines of progress.")
@debug_option
def latency(shape: str, **options: Any) -> None:
    """Measure one stream: tokens a second, the time to the first token, the memory bandwidth used.

    SHAPE is a name (smollm2-135m, llama-3.1-8b, llama-2-7b, ...), a config.json or a directory that holds one. The
    weights are random. A prompt of 32 tokens; the tokens from 16 to 144 are timed through LLM.generate, greedily, by
    the wall clock. Each engine and precision runs in a process of its own, one after the other.
    """
    configure_logging(options["debug"])
    asked = Options(
        shape,
        weight_formats=tuple("dense" if name == "none" else name for name in options["quantize"]) or ("dense",),
        contexts=options["context"] or (PROMPT,),
        rounds=options["rounds"],
        dtype=options["dtype"],
        device=options["device"],
        threads=options["threads"],
        mode=options["mode"],
        against=options["against"],
    )
    plot_path, json_path = options["plot_path"], options["json_path"]
    if json_path not in (None, "-") and not Path(json_path).resolve().parent.is_dir():
        raise UsageError(f"--json {json_path}: there is no such directory")
    if plot_path is not None:
        from paceline.benchmark.plot import check_plot, plot

        check_plot(plot_path)
    report = run(asked, tell=_nothing if options["quiet"] else _tell)
    command = " ".join(["paceline", *sys.argv[1:]])
    text = json.dumps({"command": command, "paceline": __version__, **dataclasses.asdict(report)}, indent=2)
    if json_path == "-":
        click.echo(text)
    else:
        if json_path is not None:
            Path(json_path).write_text(text + "\n")
        from paceline.cli.bench_tables import print_report

        print_report(report, __version__)
    if plot_path is not None:
        plot(report, plot_path, __version__)
    if report.failures:
        failed = "; ".join(f"{one.engine} {one.weight_format}: {one.error}" for one in report.failures)
        raise EngineError(f"not measured: {failed}")


def _tell(line: str) -> None:
    click.echo(line, err=True)


def _nothing(line: str) -> None:
    pass
