"""Where the time of a start goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Phases:
    """Seconds of named parts, in the order in which they began; a part that comes again is added to."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []

    @property
    def current(self) -> str | None:
        """The part that runs, the last one begun of several: parts may nest, or run in threads beside each other."""
        return next(reversed(self._running), None)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self._running.append(name)
        yield
        self._running.remove(name)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
