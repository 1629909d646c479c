"""The tables of `paceline bench latency`, drawn with rich."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from paceline.benchmark import throughput
from paceline.benchmark.attempts import Failure
from paceline.benchmark.job import Result, at_once
from paceline.benchmark.latency import Report
from paceline.benchmark.protocol import FIRST, LAST
from paceline.sizing import GIB


def print_report(report: Report, version: str) -> None:
    """`version`: paceline's own."""
    console = make_console()
    print_head(console, report, version)
    console.print(_speeds(report))
    console.print(
        f"[dim]Tokens {FIRST} to {LAST} after the prompt, greedy, medians of {report.rounds} rounds, random weights. "
        f"Roof: {report.roof / 1e9:,.0f} GB/s, measured by reading. Ratio: paceline's tok/s over this engine's.[/dim]\n"
    )
    console.print(_starts(report.results))
    console.print(_memory(report.results))
    print_failures(console, report.failures)


def make_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)  # a file has no width


def print_head(console: Console, report: Report | throughput.Report, version: str) -> None:
    """What was measured, where, in which versions."""
    machine = report.machine
    theirs = {result.engine: result.version for result in report.results if result.version is not None}
    named = {"paceline": version, "torch": machine["torch"], "python": machine["python"], **theirs}
    versions = ", ".join(f"{name} {number}" for name, number in named.items())
    console.print(f"[bold]{report.shape}[/bold]  {report.dtype}, {machine['device']} ({report.device}), {versions}\n")


def print_failures(console: Console, failures: Sequence[Failure]) -> None:
    for failure in failures:
        console.print(f"[red]{failure.engine} {failure.weight_format} ✗[/red] {failure.error}", markup=True)


def _speeds(report: Report) -> Table:
    heads = {(result.engine, result.weight_format): result.head_bits for result in report.results}
    table = make_table(
        "One stream",
        ("engine", "weights"),
        ("prompt", "tok/s", "ms", "GB/token", "GB/s", "of roof", "TTFT ms", "ratio"),
    )
    for row in report.rows:
        table.add_row(
            row.engine,
            f"{row.weight_format}, head {heads[row.engine, row.weight_format]:.0f} bit",
            f"{row.context:,}",
            f"{row.tokens_per_second:,.1f}",
            f"{row.seconds_per_token * 1e3:,.2f}",
            f"{row.bytes_per_token / 1e9:,.3f}",
            f"{row.bytes_per_second / 1e9:,.1f}",
            f"{row.share:.0%}",
            f"{row.ttft * 1e3:,.1f}",
            "" if row.ratio is None else f"{row.ratio:,.2f}x",
        )
    return table


def _starts(results: Sequence[Result]) -> Table:
    phases = list(dict.fromkeys(name for result in results for name in result.phases))
    table = make_table(
        "Seconds to the first token, from the start of the process", ("engine", "weights"), (*phases, "all")
    )
    for result in results:
        cells = [f"{result.phases[name]:,.2f}" if name in result.phases else "" for name in phases]
        table.add_row(result.engine, result.weight_format, *cells, f"{sum(result.phases.values()):,.2f}")
    return table


def _memory(results: Sequence[Result]) -> Table:
    """Measured and planned, part by part, where the device counts; else what was planned."""
    counted = any(result.memory.measured is not None for result in results)
    parts = dict.fromkeys(part for r in results for part in (*(r.memory.planned or ()), *(r.memory.measured or ())))
    peak = "peak" if counted else "peak of the process"
    title = "GiB on the device, measured / planned" if counted else "GiB planned"
    table = make_table(title, ("engine", "weights"), (*parts, "all at once", peak))
    for result in results:
        memory = result.memory
        both = [sizes for sizes in (memory.measured, memory.planned) if sizes is not None]
        cells = [" / ".join(f"{sizes[part] / GIB:,.3f}" for sizes in both if part in sizes) for part in parts]
        cells.append(" / ".join(f"{at_once(sizes) / GIB:,.3f}" for sizes in both))
        table.add_row(
            result.engine, result.weight_format, *cells, "" if memory.peak is None else f"{memory.peak / GIB:,.3f}"
        )
    return table


def make_table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """With columns of words, then of numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=SIMPLE_HEAD)
    for head in words:
        table.add_column(head)
    for head in numbers:
        table.add_column(head, justify="right")
    return table
