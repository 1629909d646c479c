"""`paceline bench`: measure this machine, by a protocol that is the same for every engine."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import click

from paceline import __version__
from paceline.benchmark import throughput as throughput_bench
from paceline.benchmark.attempts import Failure
from paceline.benchmark.latency import Options, run
from paceline.benchmark.protocol import PROMPT
from paceline.benchmark.throughput import STEP_TOKENS
from paceline.cli.bench_options import workload_of, workload_options
from paceline.cli.group import NearestGroup
from paceline.cli.options import (
    Command,
    check_report_paths,
    configure_logging,
    debug_option,
    device_option,
    mode_option,
    tensor_parallel_option,
    threads_option,
    with_options,
    write_json,
)
from paceline.config import QUANTIZATIONS
from paceline.errors import EngineError


@click.group(cls=NearestGroup)
def bench() -> None:
    """Measure how fast models run here, with random weights of their true shapes, or a server that runs somewhere."""


def _measured(command: Command) -> Command:
    """How the model is run, where, and in which precisions."""
    return with_options(
        command,
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            default="auto",
            show_default=True,
            help="What it is computed in; auto is the dtype that the model is published in.",
        ),
        click.option(
            "--quantize",
            multiple=True,
            type=click.Choice(["none", *QUANTIZATIONS]),
            help="How weights are stored; several are a row each [default: none].",
        ),
        device_option,
        mode_option,
        threads_option,
    )


def _reported(command: Command) -> Command:
    """Where figures go."""
    return with_options(
        command,
        click.option("--json", "json_path", metavar="FILE", help="Write every figure there, '-' for standard output."),
        click.option(
            "--plot", "plot_path", metavar="FILE", help="Draw tokens/s and their roof there (needs matplotlib)."
        ),
        click.option("--quiet", is_flag=True, help="No lines of progress."),
    )


@bench.command()
@click.argument("shape", default="smollm2-135m")
@click.option(
    "--context", type=int, multiple=True, metavar="N", help=f"Tokens of the prompt; several [default: {PROMPT}]."
)
@click.option("--rounds", type=int, default=5, show_default=True, metavar="N", help="Figures are medians of N.")
@_measured
@tensor_parallel_option
@click.option(
    "--against",
    multiple=True,
    metavar="ENGINE",
    help="transformers, or gpt-fast=DIR, a checkout of it: measured in the same run; several.",
)
@_reported
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
        weight_formats=_weight_formats(options["quantize"]),
        contexts=options["context"] or (PROMPT,),
        rounds=options["rounds"],
        dtype=options["dtype"],
        device=options["device"],
        threads=options["threads"],
        mode=options["mode"],
        tensor_parallel_size=options["tensor_parallel_size"],
        against=options["against"],
    )
    check_report_paths(options["json_path"], options["plot_path"])
    report = run(asked, tell=_nothing if options["quiet"] else _tell)
    if write_json(options["json_path"], _figures(report)):
        from paceline.cli.bench_tables import print_report

        print_report(report, __version__)
    if options["plot_path"] is not None:
        from paceline.benchmark.plot import plot

        plot(report, options["plot_path"], __version__)
    _fail_for(report.failures)


@bench.command()
@click.argument("shape", default="smollm2-135m")
@click.option("--requests", type=int, default=256, show_default=True, metavar="N", help="Requests, all at once.")
@workload_options
@click.option(
    "--batch", type=int, multiple=True, metavar="N", help="Time the decodes of N streams alone, too; several."
)
@click.option("--decode-only", is_flag=True, help="Only the decodes of each --batch.")
@click.option(
    "--max-num-seqs", type=int, default=256, show_default=True, metavar="N", help="Requests that run at once."
)
@click.option("--step-tokens", type=int, default=STEP_TOKENS, show_default=True, metavar="N", help="Tokens of a step.")
@click.option("--rounds", type=int, default=3, show_default=True, metavar="N", help="Figures are medians of N.")
@_measured
@click.option(
    "--against", multiple=True, metavar="ENGINE", help="transformers, in batches padded on the left: in the same run."
)
@_reported
@debug_option
def throughput(shape: str, **options: Any) -> None:
    """Measure many streams: tokens a second of requests that come all at once, and of decodes alone.

    SHAPE is a name (smollm2-135m, llama-3.1-8b, ...), a config.json or a directory that holds one. The weights and the
    prompts are random; every answer has its whole length, greedily. One call of LLM.generate is timed by the wall
    clock. Each engine and precision runs in a process of its own, one after the other.
    """
    configure_logging(options["debug"])
    asked = throughput_bench.Options(
        shape,
        workload_of(options),
        offline=not options["decode_only"],
        batches=options["batch"],
        weight_formats=_weight_formats(options["quantize"]),
        rounds=options["rounds"],
        streams=options["max_num_seqs"],
        step_tokens=options["step_tokens"],
        dtype=options["dtype"],
        device=options["device"],
        threads=options["threads"],
        against=options["against"],
        mode=options["mode"],
    )
    check_report_paths(options["json_path"], options["plot_path"])
    report = throughput_bench.run(asked, tell=_nothing if options["quiet"] else _tell)
    if write_json(options["json_path"], _figures(report)):
        from paceline.cli.throughput_tables import print_report

        print_report(report, __version__)
    if options["plot_path"] is not None:
        from paceline.benchmark.plot import plot_throughput

        plot_throughput(report, options["plot_path"], __version__)
    _fail_for(report.failures)


def _weight_formats(names: Sequence[str]) -> tuple[str, ...]:
    return tuple("dense" if name == "none" else name for name in names) or ("dense",)


def _figures(report: Any) -> dict[str, Any]:
    return {"command": " ".join(["paceline", *sys.argv[1:]]), **dataclasses.asdict(report)}


def _fail_for(failures: Sequence[Failure]) -> None:
    if failures:
        failed = "; ".join(f"{one.engine} {one.weight_format}: {one.error}" for one in failures)
        raise EngineError(f"not measured: {failed}")


def _tell(line: str) -> None:
    click.echo(line, err=True)


def _nothing(line: str) -> None:
    pass
