"""`paceline bench serve`: load on a server, this one or any other of OpenAI's API."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import click

from paceline import __version__
from paceline.benchmark.serve_figures import Slo
from paceline.cli.bench_options import workload_of, workload_options
from paceline.cli.options import check_report_paths, configure_logging, debug_option, write_json

if TYPE_CHECKING:
    from paceline.benchmark.serve import Report


class _Rate(click.ParamType[float]):
    """Requests a second, or inf."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            rate = float(value)
        except ValueError:
            rate = math.nan
        if not rate > 0:
            self.fail(f"'{value}' is no rate: requests a second, or inf", param, ctx)
        return rate


@click.command("serve")
@click.argument("url", default="http://127.0.0.1:8000")
@click.option("--model", metavar="NAME", help="What requests call it [default: the first that the server names].")
@click.option("--api-key", envvar="PACELINE_API_KEY", show_envvar=True, metavar="KEY", help="Sent with every request.")
@click.option("--rate", type=_Rate(), multiple=True, metavar="R", help="Requests a second; several [default: inf].")
@click.option("--requests", type=int, default=256, show_default=True, metavar="N", help="Requests of each rate.")
@workload_options
@click.option("--warmup", type=int, default=8, show_default=True, metavar="N", help="Requests sent before, at once.")
@click.option(
    "--ignore-eos/--no-ignore-eos",
    default=True,
    show_default=True,
    help="Ask for answers of their whole length; services that know no ignore_eos refuse it.",
)
@click.option("--goodput", metavar="SLO", help="Count good answers: 'ttft:500 tpot:50 e2el:10000', in milliseconds.")
@click.option("--json", "json_path", metavar="FILE", help="Write every figure there, '-' for standard output.")
@click.option("--plot", "plot_path", metavar="FILE", help="Draw how latencies are spread (needs matplotlib).")
@click.option("--quiet", is_flag=True, help="No lines of progress.")
@debug_option
def bench_serve(url: str, **options: Any) -> None:
    """Measure a server under load: latencies, throughput, and what share of answers keeps a promise.

    URL is any server of OpenAI's API. Streaming chats of random words come as a Poisson process, whether or not earlier
    ones are done; each rate is a round of its own. A request's times count from when it was due.
    """
    configure_logging(options["debug"])
    from paceline.benchmark.serve import Options, run  # asyncio and TLS: not for every command's start

    asked = Options(
        url,
        options["model"],
        options["api_key"],
        workload_of(options),
        rates=options["rate"] or (math.inf,),
        slo=None if options["goodput"] is None else Slo.parse(options["goodput"]),
        warmup=options["warmup"],
        ignore_eos=options["ignore_eos"],
    )
    plot_path, json_path = options["plot_path"], options["json_path"]
    check_report_paths(json_path, plot_path)
    report = run(asked, tell=(lambda line: None) if options["quiet"] else (lambda line: click.echo(line, err=True)))
    if write_json(json_path, _figures(report)):
        from paceline.cli.serve_tables import print_report

        print_report(report, __version__)
    if plot_path is not None:
        from paceline.benchmark.serve_plot import plot

        plot(report, plot_path, __version__)


def _figures(report: Report) -> dict[str, Any]:
    """Without the command line, which may hold a key. JSON has no infinity: a round without a rate of its own has
    null."""
    value = dataclasses.asdict(report)
    for one in value["rounds"]:
        one["rate"] = None if math.isinf(one["rate"]) else one["rate"]
    return value
