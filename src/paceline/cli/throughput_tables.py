"""The tables of `paceline bench throughput`, drawn with rich."""

from __future__ import annotations

from rich.table import Table

from paceline.benchmark.protocol import FIRST, LAST, PROMPT
from paceline.benchmark.throughput import Report
from paceline.benchmark.workload import Workload
from paceline.cli.bench_tables import make_console, make_table, print_failures, print_head
from paceline.sizing import GIB


def print_report(report: Report, version: str) -> None:
    """`version`: paceline's own."""
    console = make_console()
    print_head(console, report, version)
    if report.workload is not None:
        console.print(_offline(report, report.workload))
    if any(row.batch is not None for row in report.rows):
        console.print(_decodes(report))
    console.print(
        f"[dim]Medians of {report.rounds} rounds, random weights, at most {report.streams} requests at once, "
        f"{report.step_tokens:,} tokens a step. Decodes: tokens {FIRST} to {LAST} of prompts of {PROMPT}. Roofs, "
        f"measured: {report.bandwidth / 1e9:,.0f} GB/s read, "
        f"{report.operations / 1e12:,.1f} TFLOP/s of {report.dtype}; "
        "the roof is what the quickest engine possible would reach there. Bytes are those that it would read. Ratio: "
        "paceline's tok/s over this engine's.[/dim]\n"
    )
    console.print(_processes(report))
    print_failures(console, report.failures)


def _offline(report: Report, workload: Workload) -> Table:
    lengths = f"{workload.input_len:,} in / {workload.output_len:,} out"
    lengths += " on average" if workload.mixed else ""
    prefix = f", after {workload.prefix:,} shared by {workload.groups} group(s)" if workload.prefix else ""
    title = f"{workload.num_requests:,} requests at once, {lengths}{prefix}, seed {workload.seed}"
    numbers = ("out tok/s", "all tok/s", "seconds", "requests/s", "GB/s", "roof tok/s", "of roof", "ratio")
    table = make_table(title, ("engine", "weights"), numbers)
    for row in report.rows:
        if row.batch is None:
            table.add_row(
                row.engine,
                row.weight_format,
                f"{row.rate:,.1f}",
                f"{row.total_rate:,.1f}",
                f"{row.seconds:,.2f}",
                f"{workload.num_requests / row.seconds:,.2f}",
                f"{row.bytes_per_second / 1e9:,.1f}",
                f"{row.roof_rate:,.1f}",
                f"{row.share:.0%}",
                "" if row.ratio is None else f"{row.ratio:,.2f}x",
            )
    return table


def _decodes(report: Report) -> Table:
    numbers = ("streams", "tok/s", "ms a step", "GB/s", "roof tok/s", "of roof", "ratio")
    table = make_table("Decodes alone", ("engine", "weights"), numbers)
    for row in report.rows:
        if row.batch is not None:
            table.add_row(
                row.engine,
                row.weight_format,
                f"{row.batch}",
                f"{row.rate:,.1f}",
                f"{1e3 * row.batch / row.rate:,.2f}",
                f"{row.bytes_per_second / 1e9:,.1f}",
                f"{row.roof_rate:,.1f}",
                f"{row.share:.0%}",
                "" if row.ratio is None else f"{row.ratio:,.2f}x",
            )
    return table


def _processes(report: Report) -> Table:
    table = make_table("Processes", ("engine", "weights"), ("seconds to start", "peak GiB"))
    for result in report.results:
        table.add_row(result.engine, result.weight_format, f"{result.start:,.2f}", f"{result.peak / GIB:,.3f}")
    return table
