"""The workload that `paceline bench throughput` and `paceline bench serve` are asked for in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from paceline.benchmark.workload import Workload
from paceline.cli.options import Command, with_options


def workload_options(command: Command) -> Command:
    """All but the number of requests, which means all at once to one and of each rate to the other."""
    return with_options(
        command,
        click.option("--input-len", type=int, default=512, show_default=True, metavar="N", help="Tokens of a prompt."),
        click.option(
            "--output-len", type=int, default=256, show_default=True, metavar="N", help="Tokens of an answer."
        ),
        click.option("--mixed", is_flag=True, help="Lengths are drawn, log-normal, with those as their means."),
        click.option(
            "--prefix", type=int, default=0, metavar="N", help="Tokens before each prompt that all of a group share."
        ),
        click.option(
            "--groups", type=int, default=1, show_default=True, metavar="N", help="Groups that share a prefix."
        ),
        click.option(
            "--seed", type=int, default=0, show_default=True, metavar="N", help="Of everything that is drawn."
        ),
    )


def workload_of(options: Mapping[str, Any]) -> Workload:
    """Raises UsageError for one that cannot be."""
    return Workload(
        options["requests"],
        options["input_len"],
        options["output_len"],
        options["mixed"],
        options["prefix"],
        options["groups"],
        options["seed"],
    )
