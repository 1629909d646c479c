"""Which kernel runs each operation of a model, and why not a better one: asked of the code that decides.

Whatever runs on a device says so in `choices(rows)`: a model, and, with the step around it, an LLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from paceline.errors import UsageError


@dataclass(frozen=True)
class Choice:
    """`reason`: why nothing better runs; empty where nothing better is known. `count`: of such operations in a step."""

    operation: str
    kernel: str
    reason: str = ""
    count: int = 1


class Explains(Protocol):
    def choices(self, rows: int) -> Iterable[Choice]: ...


class Explanation(tuple[Choice, ...]):
    """The choices; as text a table, a line each."""

    def __str__(self) -> str:
        rows = [("operation", "", "kernel", "why nothing better")]
        rows += [(one.operation, f"{one.count}x", one.kernel, one.reason or "-") for one in self]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join("  ".join([*map(str.ljust, row, widths), row[3]]).rstrip() for row in rows)


def explain(llm_or_model: Explains, rows: int = 1) -> Explanation:
    """What a decode of `rows` requests runs, and the attention of prompts: a Choice for each distinct operation, in the
    order of the step.

    Raises UsageError for fewer rows than 1.
    """
    if rows < 1:
        raise UsageError(f"a step has at least 1 row, got {rows}")
    return Explanation(_merged(llm_or_model.choices(rows)))


def fallbacks(choices: Iterable[Choice]) -> list[str]:
    """A line a reason: what runs otherwise than it could, and by what."""
    found: dict[tuple[str, str], list[str]] = {}
    for choice in _merged(choices):
        if choice.reason:
            found.setdefault((choice.reason, choice.kernel), []).append(choice.operation)
    return [f"{', '.join(names)}: {kernel}, since {reason}" for (reason, kernel), names in found.items()]


def _merged(choices: Iterable[Choice]) -> Iterator[Choice]:
    """Equal ones once, counted; in the order in which each first comes."""
    counts: dict[Choice, int] = {}
    for choice in choices:
        one = replace(choice, count=1)
        counts[one] = counts.get(one, 0) + choice.count
    return (replace(choice, count=count) for choice, count in counts.items())


def either(refusal: str | None, kernel: str, plain: str) -> tuple[str, str]:
    """The kernel where nothing is against it, else the plain one and what is."""
    return (kernel, "") if refusal is None else (plain, refusal)
