"""Measuring one engine after the other: a failure of one is told, and is not the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from paceline.errors import EngineError, UsageError


class Asked(Protocol):
    """What one process measures."""

    @property
    def engine(self) -> str: ...

    @property
    def weight_format(self) -> str: ...


def check_asked(asked: Any, *lists: str) -> None:
    """Raises UsageError for a benchmark's options that name one thing twice in a list, or no weight format."""
    for name in (*lists, "weight_formats", "against"):
        values = getattr(asked, name)
        if len(set(values)) < len(values):
            raise UsageError(f"{name} names the same twice: {', '.join(map(str, values))}")
    if not asked.weight_formats:
        raise UsageError("no weight format is given: name one, such as dense")


Job = TypeVar("Job", bound=Asked)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    engine: str
    weight_format: str
    error: str


@dataclass
class Attempts(Generic[Job, Result]):
    """`tell` hears a line before and after each; `rates` says in it what was measured."""

    run_job: Callable[[Job], Result]
    tell: Callable[[str], None]
    rates: Callable[[Result], str]
    results: list[Result] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def attempt(self, job: Job) -> None:
        """Raises UsageError for what could not be right."""
        name = f"{job.engine} {job.weight_format}"
        self.tell(f"{name} ...")
        start = time.monotonic()
        try:
            result = self.run_job(job)
        except (UsageError, EngineError) as error:
            if isinstance(error, UsageError) and job.engine == "paceline":  # the others would be asked the same
                raise
            self.failures.append(Failure(job.engine, job.weight_format, str(error)))
            self.tell(f"{name} failed: {error}")
        else:
            self.results.append(result)
            self.tell(f"{name}: {self.rates(result)} (measured in {time.monotonic() - start:.0f} s)")
