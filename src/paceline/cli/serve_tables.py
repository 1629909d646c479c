"""The tables of `paceline bench serve`, drawn with rich."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from paceline.benchmark.serve import Report
from paceline.benchmark.serve_figures import PERCENTILES
from paceline.cli.bench_tables import make_table

LATE = 0.010  # seconds at p99 beyond which the client, not the server, may be what was measured


def print_report(report: Report, version: str) -> None:
    """`version`: paceline's own."""
    console = Console(highlight=False)
    if not console.is_terminal:  # a file has no width
        console = Console(highlight=False, width=140)
    work = report.workload
    mixed = " on average, drawn log-normal" if work.mixed else ""
    console.print(
        f"[bold]{report.model}[/bold] at {report.url}: {work.num_requests} streaming chats a round, "
        f"{work.prefix + work.input_len} + {work.output_len} tokens{mixed}, greedy, client paceline {version}\n"
    )
    console.print(_rates(report))
    console.print(_latencies(report))
    if not report.counted_by_server:
        console.print("[dim]The server tells no token counts: each chunk counts as one.[/dim]")
    for one in report.rounds:
        for message, count in one.errors.items():
            console.print(f"[red]{one.rate:g} requests/s: {count} failed[/red] {message}", markup=True)
        if one.late["p99"] > LATE:
            console.print(
                f"[red]{one.rate:g} requests/s: this client was late by {1e3 * one.late['p99']:,.0f} ms at p99[/red]; "
                "the latencies have it in them"
            )


def _rates(report: Report) -> Table:
    heads = ["seconds", "answered", "failed", "req/s", "prompt tok", "output tok", "output tok/s", "total tok/s"]
    table = make_table("Throughput", ("rate",), heads + ([] if report.slo is None else ["good req/s", "good"]))
    for one in report.rounds:
        answered = one.num_requests - one.num_failed
        cells = [
            f"{one.seconds:,.1f}",
            f"{answered:,}",
            f"{one.num_failed:,}",
            f"{one.request_rate:,.2f}",
            f"{one.prompt_tokens / max(1, answered):,.0f}",
            f"{one.output_tokens / max(1, answered):,.0f}",
            f"{one.output_rate:,.0f}",
            f"{one.total_rate:,.0f}",
        ]
        if one.good_rate is not None and one.good_share is not None:
            cells += [f"{one.good_rate:,.2f}", f"{one.good_share:.0%}"]
        table.add_row(f"{one.rate:g}", *cells)
    return table


def _latencies(report: Report) -> Table:
    table = make_table("Milliseconds", ("rate", "of"), [f"p{percent}" for percent in PERCENTILES])
    for one in report.rounds:
        kinds = {"TTFT": one.ttft, "TPOT": one.tpot, "ITL": one.itl, "latency": one.latency}
        for name, figures in kinds.items():
            cells = [f"{1e3 * value:,.1f}" for value in figures.values()]
            table.add_row(f"{one.rate:g}" if name == "TTFT" else "", name, *cells)
    return table
