"""Where the time of a start goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Phases:
    """Seconds of named parts, in the order in which they began; a part that comes again is added to."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.current: str | None = None  # the part that runs; of nested ones the outer, once the inner is over

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        outer, self.current = self.current, name
        yield
        self.current = outer
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
