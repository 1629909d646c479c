"""`paceline batch`: a file of requests answered into a file, by a server's rules and without one."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paceline.cli.load_options import load_options, text_options
from paceline.cli.model import interrupt_ends_at_once
from paceline.cli.options import configure_logging, debug_option
from paceline.cli.serve_options import model_and_engine_options
from paceline.errors import PacelineError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.batch.run import Progress


@click.command()
@click.argument("requests_path", metavar="IN.jsonl")
@click.argument("answers_path", metavar="OUT.jsonl")
@model_and_engine_options
@click.option(
    "--served-model-name",
    multiple=True,
    metavar="NAME",
    help="What requests call the model; several [default: as it was given].",
)
@click.option("--quiet", is_flag=True, help="No progress and no line of figures.")
@debug_option
def batch(requests_path: str, answers_path: str, **options: Any) -> None:
    """Answer the requests of IN.jsonl into OUT.jsonl, both in the form of OpenAI's batch files.

    A request that is refused has its status and error there. Each answer is written whole as soon as it is ready; the
    same command after an interruption goes on with what OUT.jsonl does not have.
    """
    configure_logging(options["debug"])
    load = load_options(options)
    with interrupt_ends_at_once():
        import asyncio

        from paceline.batch.files import open_answers, open_requests
        from paceline.batch.run import run_batch
        from paceline.serve.admission import QueueLimits
        from paceline.serve.service import Service
        from paceline.serve.settings import ServerSettings
        from paceline.serve.zmq_client import ZmqClient, supervised

    if Path(requests_path).resolve() == Path(answers_path).resolve():
        raise UsageError(f"{answers_path} is the file of the requests: write the answers to another one")
    with (
        open_requests(requests_path) as requests,
        open_answers(answers_path, {place.custom_id for place in requests.places}) as answers,
    ):
        there, total = len(answers.answered), len(requests.places)
        if there == total:
            _tell(options, f"all {total} requests are answered in {answers_path} already")
        else:
            _tell(options, f"{load.model}: {total - there} of {total} requests to answer")
            settings = ServerSettings(options["served_model_name"] or (load.model,), max_logprobs=-1)
            client = ZmqClient(supervised(load, limits=QueueLimits(None, None), threads=options["threads"]))
            service = Service(client, settings, text_options(load).load)
            start = time.perf_counter()
            with _bar(there, total, quiet=options["quiet"]) as told:
                progress = asyncio.run(run_batch(service, requests, answers, told))
            seconds = time.perf_counter() - start
            figures = f"{progress.num_tokens:,} tokens in {seconds:.1f} s ({progress.num_tokens / seconds:,.0f} tok/s)"
            _tell(options, f"{progress.num_answers} answers, {figures}")
    if answers.num_failed:
        raise PacelineError(f"{answers.num_failed} requests were refused or failed; {answers_path} says why")


def _tell(options: dict[str, Any], line: str) -> None:
    if not options["quiet"]:
        click.echo(line, err=True)


@contextmanager
def _bar(done: int, total: int, *, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A progress bar on stderr, where somebody can see it and wants it."""
    if quiet or not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[tokens]:,} tokens"), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, completed=done, tokens=0)
        yield lambda progress: bar.update(task, completed=done + progress.num_answers, tokens=progress.num_tokens)
