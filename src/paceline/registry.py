"""Look-ups by name that fail with the nearest known name. Tables are plain dicts, made at import and never changed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from paceline.errors import UsageError

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """One line: the unknown name, the nearest known one, and all the choices when they are few."""
    choices = sorted(known)
    close = nearest(name, choices)
    hint = f"; did you mean '{close}'?" if close else ""
    listing = f" (known: {', '.join(choices)})" if len(choices) <= 12 else ""
    return f"unknown {what} '{name}'{hint}{listing}"


def lookup(table: Mapping[str, T], what: str, name: str) -> T:
    """`table[name]`, or a UsageError naming the nearest known name."""
    try:
        return table[name]
    except KeyError:
        raise UsageError(unknown(what, name, table)) from None


def refuse_unknown_keys(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a UsageError for the first key of `given` that is not in `known`."""
    known = list(known)
    for key in given:
        if key not in known:
            raise UsageError(unknown(what, key, known))
