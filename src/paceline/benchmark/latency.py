"""One stream's latency at several precisions, beside other engines: a worker process for each, one after the other.

No torch here: the engines have it in their own processes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.benchmark import protocol
from paceline.benchmark.attempts import Attempts, Failure, check_asked
from paceline.benchmark.job import Job, Result, read_result
from paceline.benchmark.process import run_process
from paceline.benchmark.shapes import read_shape
from paceline.errors import EngineError, UsageError

RIVALS = ("transformers", "gpt-fast")

Run = Callable[[Job], Result]


@dataclass(frozen=True)
class Options:
    """`shape`: as read_shape takes it. `weight_formats`: "dense" or a format's name, a row each. `against`: RIVALS,
    or "gpt-fast=DIR". `mode`, `tensor_parallel_size`: paceline's, as LLM takes them; the others run on one device."""

    shape: str
    weight_formats: tuple[str, ...] = ("dense",)
    contexts: tuple[int, ...] = (protocol.PROMPT,)
    rounds: int = 5
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    against: tuple[str, ...] = ()
    mode: str = "auto"
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UsageError(f"rounds must be at least 1, got {self.rounds}")
        check_asked(self, "contexts")
        if not self.contexts or min(self.contexts) < 1:
            raise UsageError(f"a context holds at least 1 token, got {min(self.contexts, default=0)}")
        for rival in self.against:
            name, _, folder = rival.partition("=")
            if name not in RIVALS or bool(folder) != (name == "gpt-fast"):
                raise UsageError(f"against must be transformers or gpt-fast=DIR, got {rival!r}")


@dataclass(frozen=True)
class Row:
    """One engine at one precision and context. `ratio`: paceline's tokens a second over this engine's, at the same
    context and in the same weight format where paceline has it, else dense; None for paceline's own rows.
    `share`: of the roof."""

    engine: str
    weight_format: str
    context: int
    tokens_per_second: float
    seconds_per_token: float
    ttft: float
    bytes_per_token: int
    bytes_per_second: float
    share: float
    ratio: float | None


@dataclass(frozen=True)
class Report:
    """`roof`: bytes a second, the most that any of the processes read."""

    shape: str
    config: Mapping[str, Any]
    rounds: int
    dtype: str
    device: str
    machine: Mapping[str, Any]
    roof: float
    rows: tuple[Row, ...]
    results: tuple[Result, ...]
    failures: tuple[Failure, ...]


def run(options: Options, *, tell: Callable[[str], None] = lambda line: None, run_job: Run | None = None) -> Report:
    """Measure paceline in each weight format, then the engines it is measured against. `tell` hears a line before and
    after each.

    A failure of one engine is a row of the report, not the end. Raises UsageError for what could not be right, and
    EngineError where paceline itself gave no result at all.
    """
    config = read_shape(options.shape)
    attempts: Attempts[Job, Result] = Attempts(run_job or run_worker, tell, _speeds)
    base = Job(
        "paceline",
        options.shape,
        config,
        options.contexts,
        options.rounds,
        options.dtype,
        device=options.device,
        threads=options.threads,
        mode=options.mode,
        tensor_parallel_size=options.tensor_parallel_size,
    )
    for weight_format in options.weight_formats:
        attempts.attempt(dataclasses.replace(base, weight_format=weight_format))
    if not attempts.results:
        raise EngineError(attempts.failures[0].error)
    first = attempts.results[0]
    for job in _rivals(dataclasses.replace(base, dtype=first.dtype, device=first.device), options):
        attempts.attempt(job)
    return _report(options, config, attempts.results, attempts.failures)


def _speeds(result: Result) -> str:
    return ", ".join(f"{one.timing.tokens_per_second:,.1f} tok/s" for one in result.contexts)


def _report(
    options: Options, config: Mapping[str, Any], results: Sequence[Result], failures: Sequence[Failure]
) -> Report:
    first, roof = results[0], max(result.bandwidth for result in results)
    return Report(
        options.shape,
        config,
        options.rounds,
        first.dtype,
        first.device,
        first.machine,
        roof,
        tuple(_rows(results, roof)),
        tuple(results),
        tuple(failures),
    )


def _rivals(base: Job, options: Options) -> list[Job]:
    jobs = []
    for rival in options.against:
        name, _, folder = rival.partition("=")
        if name == "transformers":
            jobs.append(dataclasses.replace(base, engine=name))
            if base.device.startswith("cuda"):  # where it compiles; on the CPU its static cache is only larger
                jobs.append(dataclasses.replace(base, engine="transformers static"))
        else:
            jobs += [
                dataclasses.replace(base, engine=name, gpt_fast=folder, weight_format=weight_format)
                for weight_format in options.weight_formats
            ]
    return jobs


def _rows(results: Sequence[Result], roof: float) -> list[Row]:
    ours = {
        (result.weight_format, one.timing.context): one.timing.tokens_per_second
        for result in results
        if result.engine == "paceline"
        for one in result.contexts
    }
    rows = []
    for result in results:
        for one in result.contexts:
            rate, context = one.timing.tokens_per_second, one.timing.context
            mine = ours.get((result.weight_format, context), ours.get(("dense", context)))
            rows.append(
                Row(
                    result.engine,
                    result.weight_format,
                    context,
                    tokens_per_second=rate,
                    seconds_per_token=1 / rate,
                    ttft=one.timing.ttft,
                    bytes_per_token=one.bytes_per_token,
                    bytes_per_second=rate * one.bytes_per_token,
                    share=rate * one.bytes_per_token / roof,
                    ratio=None if result.engine == "paceline" or mine is None else mine / rate,
                )
            )
    return rows


def run_worker(job: Job) -> Result:
    """Run `job` in a new process. Raises UsageError or EngineError with what it says."""
    data = dataclasses.asdict(dataclasses.replace(job, started=time.time()))
    return read_result(run_process("paceline.benchmark.worker", data))
