"""`paceline explain`: which kernel runs each operation of a model on this machine, and why not a better one."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

from paceline.cli.model import load_model, write_stdout
from paceline.cli.options import configure_logging, debug_option, engine_options


@click.command()
@engine_options
@click.option("--rows", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Requests a step.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of the table.")
@click.option("--quiet", is_flag=True, help="No progress.")
@debug_option
def explain(rows: int, as_json: bool, **options: Any) -> None:
    """Load a model and show what a decode runs: an operation a line, how often, by which kernel, and why no better one.

    A machine without Triton, a GPU without bfloat16, a shape that no kernel takes: the last column says so. What the
    machine itself can do is in paceline env.
    """
    configure_logging(options["debug"])
    with load_model(options) as llm:
        from paceline.kernels import explain as choices_of

        found = choices_of(llm, rows)
    text = json.dumps([dataclasses.asdict(one) for one in found], ensure_ascii=False) if as_json else str(found)
    write_stdout(text + "\n")
