"""How much may wait: by requests and by prompt tokens. Beyond that a client is told when to ask again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from paceline.errors import QueueFullError, UsageError

_REMEMBERED = 64  # starts that the rate is taken from
_RETRY_BOUNDS = (1.0, 60.0)  # seconds


@dataclass(frozen=True)
class QueueLimits:
    """`max_requests`: requests that may wait beyond those for which a sequence is free. `max_tokens`: prompt tokens
    that may wait, all requests together; one that waits alone may be longer. None: no bound."""

    max_requests: int | None = 512
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"{name} of the queue must be at least 0, got {value}")


class WaitingRoom:
    """Requests that are accepted and not started: how many tokens they have, since when they wait, how fast they go."""

    def __init__(self, limits: QueueLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._waiting: dict[str, tuple[int, float]] = {}  # prompt tokens, since when
        self._starts: deque[float] = deque(maxlen=_REMEMBERED)
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def check(self, num_tokens: int, free_seats: int) -> None:
        """Raise QueueFullError if a request of `num_tokens` may not join. `free_seats`: sequences that the next step
        can start."""
        limits, ahead = self._limits, len(self._waiting) - free_seats
        if limits.max_requests is not None and ahead >= limits.max_requests:
            raise QueueFullError(
                f"{len(self._waiting)} requests wait and the queue takes {limits.max_requests}: ask again later",
                self._retry_after(ahead + 1 - limits.max_requests),
            )
        if limits.max_tokens is not None and self._waiting and self.num_tokens + num_tokens > limits.max_tokens:
            raise QueueFullError(
                f"{self.num_tokens} prompt tokens wait already and the queue takes {limits.max_tokens}, which "
                f"{num_tokens} more exceed: ask again later",
                self._retry_after(max(1, len(self._waiting) // 2)),
            )

    def _retry_after(self, num_starts: int) -> float:
        """Seconds until so many requests have started, at the rate of the last ones."""
        low, high = _RETRY_BOUNDS
        if len(self._starts) < 2:
            return low
        pace = (self._clock() - self._starts[0]) / len(self._starts)
        return min(high, max(low, num_starts * pace))

    def join(self, request_id: str, num_tokens: int) -> None:
        self._waiting[request_id] = (num_tokens, self._clock())
        self.num_tokens += num_tokens

    def start(self, request_id: str, now: float) -> float | None:
        """The request runs since `now`: the seconds that it waited; None if it was not waiting."""
        since = self._remove(request_id)
        if since is None:
            return None
        self._starts.append(now)
        return now - since

    def leave(self, request_id: str) -> None:
        """The request was ended before it ran; one that was not waiting is ignored."""
        self._remove(request_id)

    def _remove(self, request_id: str) -> float | None:
        entry = self._waiting.pop(request_id, None)
        if entry is None:
            return None
        self.num_tokens -= entry[0]
        return entry[1]
