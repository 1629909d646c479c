"""Many streams at several precisions, beside transformers: a worker process for each, one after the other.

No torch here: the engines have it in their own processes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from paceline.benchmark.attempts import Attempts, Failure, check_asked
from paceline.benchmark.process import run_process
from paceline.benchmark.protocol import DECODED
from paceline.benchmark.shapes import read_shape
from paceline.benchmark.workload import Workload
from paceline.errors import EngineError, UsageError

RIVALS = ("transformers",)
STEP_TOKENS = 8192  # a prompt's worth for a GPU: below some thousand tokens a step waits for the weights


@dataclass(frozen=True)
class BatchJob:
    """One engine at one precision. `batches`: streams of the decodes that are timed alone. `streams`: requests that may
    run at once. `started`: time.time() when its process was started."""

    engine: str
    shape: str
    config: Mapping[str, Any]
    workload: Workload | None
    batches: tuple[int, ...]
    rounds: int
    streams: int
    step_tokens: int = STEP_TOKENS
    dtype: str = "auto"
    weight_format: str = "dense"
    device: str = "auto"
    threads: int | None = None
    mode: str = "auto"
    started: float = 0.0


@dataclass(frozen=True)
class Work:
    """Bytes to read and operations to compute, of prompts and of decodes, at least (roof.py)."""

    prompt_bytes: int
    prompt_operations: int
    decode_bytes: int
    decode_operations: int

    def seconds(self, bandwidth: float, operations: float) -> float:
        """At so many bytes and operations a second."""
        prompts = max(self.prompt_bytes / bandwidth, self.prompt_operations / operations)
        return prompts + max(self.decode_bytes / bandwidth, self.decode_operations / operations)


@dataclass(frozen=True)
class Run:
    """One thing measured, round by round. `batch`: streams that decode, or None: the offline workload."""

    batch: int | None
    seconds: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    work: Work

    @property
    def median(self) -> float:
        return median(self.seconds)


@dataclass(frozen=True)
class BatchResult:
    """`bandwidth`: bytes a second that the device reads; `operations`: a second, of a large matrix product. `peak`:
    bytes of the device's memory, or of the process's on the CPU. `start`: seconds until the engine was ready."""

    engine: str
    version: str | None
    weight_format: str
    dtype: str
    device: str
    machine: Mapping[str, Any]
    runs: tuple[Run, ...]
    step_weight_bytes: int
    bandwidth: float
    operations: float
    peak: int
    start: float


@dataclass(frozen=True)
class Options:
    """`shape`: as read_shape takes it. `weight_formats`: "dense" or a format's name, a row each. `batches`: streams of
    the decodes that are timed alone; `offline`: whether the workload is run."""

    shape: str
    workload: Workload = field(default_factory=Workload)
    offline: bool = True
    batches: tuple[int, ...] = ()
    weight_formats: tuple[str, ...] = ("dense",)
    rounds: int = 3
    streams: int = 256
    step_tokens: int = STEP_TOKENS
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    against: tuple[str, ...] = ()
    mode: str = "auto"

    def __post_init__(self) -> None:
        for name in ("rounds", "streams"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_asked(self, "batches")
        if self.batches and min(self.batches) < 1:
            raise UsageError(f"a batch has at least 1 stream, got {min(self.batches)}")
        if not self.batches and not self.offline:
            raise UsageError("nothing to measure: leave --decode-only out, or name a --batch")
        most = max(self.streams, *self.batches, 1)
        if self.step_tokens < most:
            raise UsageError(f"a step of {self.step_tokens} tokens does not hold {most} streams: raise step tokens")
        for rival in self.against:
            if rival not in RIVALS:
                raise UsageError(f"against must be {', '.join(RIVALS)}, got {rival!r}")


@dataclass(frozen=True)
class Row:
    """One run of one engine, tokens a second. `total_rate` counts prompts too. `share`: of the roof, the time that the
    quickest engine possible takes over this one's. `ratio`: paceline's rate over this engine's, dense where paceline
    has no figure in its format; None for paceline's own rows."""

    engine: str
    weight_format: str
    batch: int | None
    rate: float
    total_rate: float
    seconds: float
    bytes_per_second: float
    roof_rate: float
    share: float
    ratio: float | None


@dataclass(frozen=True)
class Report:
    """`bandwidth` and `operations`: a second, the most that any of the processes found."""

    shape: str
    config: Mapping[str, Any]
    workload: Workload | None
    rounds: int
    streams: int
    step_tokens: int
    dtype: str
    device: str
    machine: Mapping[str, Any]
    bandwidth: float
    operations: float
    rows: tuple[Row, ...]
    results: tuple[BatchResult, ...]
    failures: tuple[Failure, ...]


def run(
    options: Options,
    *,
    tell: Callable[[str], None] = lambda line: None,
    run_job: Callable[[BatchJob], BatchResult] | None = None,
) -> Report:
    """Measure paceline in each weight format, then the engines it is measured against. `tell` hears a line before and
    after each. A failure of one engine is a row of the report, not the end. Raises UsageError for what could not be
    right, and EngineError where paceline itself gave no result at all."""
    config = read_shape(options.shape)
    attempts: Attempts[BatchJob, BatchResult] = Attempts(run_job or run_worker, tell, _rates)
    base = BatchJob(
        "paceline",
        options.shape,
        config,
        options.workload if options.offline else None,
        options.batches,
        options.rounds,
        options.streams,
        options.step_tokens,
        options.dtype,
        device=options.device,
        threads=options.threads,
        mode=options.mode,
    )
    for weight_format in options.weight_formats:
        attempts.attempt(dataclasses.replace(base, weight_format=weight_format))
    results = attempts.results
    if not results:
        raise EngineError(attempts.failures[0].error)
    first = results[0]
    for rival in options.against:
        attempts.attempt(dataclasses.replace(base, engine=rival, dtype=first.dtype, device=first.device))
    roofs = max(one.bandwidth for one in results), max(one.operations for one in results)
    return Report(
        options.shape,
        config,
        base.workload,
        options.rounds,
        options.streams,
        options.step_tokens,
        first.dtype,
        first.device,
        first.machine,
        *roofs,
        tuple(_rows(results, *roofs)),
        tuple(results),
        tuple(attempts.failures),
    )


def _rates(result: BatchResult) -> str:
    return ", ".join(f"{one.output_tokens / one.median:,.0f} tok/s" for one in result.runs)


def _rows(results: Sequence[BatchResult], bandwidth: float, operations: float) -> list[Row]:
    ours = {
        (result.weight_format, one.batch): one.output_tokens / one.median
        for result in results
        if result.engine == "paceline"
        for one in result.runs
    }
    rows = []
    for result in results:
        for one in result.runs:
            seconds = one.median
            rate = one.output_tokens / seconds
            least, work = one.work.seconds(bandwidth, operations), one.work
            mine = ours.get((result.weight_format, one.batch), ours.get(("dense", one.batch)))
            rows.append(
                Row(
                    result.engine,
                    result.weight_format,
                    one.batch,
                    rate=rate,
                    total_rate=(one.prompt_tokens + one.output_tokens) / seconds,
                    seconds=seconds,
                    bytes_per_second=(work.prompt_bytes + work.decode_bytes) / seconds,
                    roof_rate=one.output_tokens / least,
                    share=least / seconds,
                    ratio=None if result.engine == "paceline" or mine is None else mine / rate,
                )
            )
    return rows


def decoded_tokens(batch: int) -> int:
    """Timed in a round of a batch's decodes: tokens FIRST to LAST of each stream, as protocol.py says."""
    return batch * DECODED


def run_worker(job: BatchJob) -> BatchResult:
    """Run `job` in a new process. Raises UsageError or EngineError with what it says."""
    data = dataclasses.asdict(dataclasses.replace(job, started=time.time()))
    return read_result(run_process("paceline.benchmark.throughput_worker", data))


def read_job(data: Mapping[str, Any]) -> BatchJob:
    workload = data["workload"]
    asked = None if workload is None else Workload(**workload)
    return BatchJob(**{**data, "batches": tuple(data["batches"]), "workload": asked})


def read_result(data: Mapping[str, Any]) -> BatchResult:
    runs = tuple(Run(**{**one, "seconds": tuple(one["seconds"]), "work": Work(**one["work"])}) for one in data["runs"])
    return BatchResult(**{**data, "runs": runs})
