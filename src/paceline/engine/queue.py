"""Requests in the order of a policy: who runs first, and, read from the end, who is preempted first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Literal

from paceline.engine.request import Request


class RequestQueue:
    """A sorted list. "fcfs": by arrival; "priority": by params.priority, smaller first, then arrival.

    A preempted request keeps its arrival, so it comes back to the place it had. Insertion moves pointers: 10 us among
    100,000 waiting requests, which is why this is no heap (a heap can neither be read in order nor lose its middle).
    """

    def __init__(self, policy: Literal["fcfs", "priority"]) -> None:
        self._key = _by_priority if policy == "priority" else _by_arrival
        self._requests: list[Request] = []
        self.num_rows = 0  # rows of a step that they may take, together

    def add(self, request: Request) -> None:
        insort(self._requests, request, key=self._key)
        self.num_rows += request.num_rows

    def remove(self, request: Request) -> None:
        """Remove a request that is in the queue."""
        index = bisect_left(self._requests, self._key(request), key=self._key)
        assert self._requests[index] is request, f"request {request.id} is not where its key says"
        del self._requests[index]
        self.num_rows -= request.num_rows

    def last(self) -> Request:
        return self._requests[-1]

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __getitem__(self, index: int) -> Request:
        return self._requests[index]


def _by_arrival(request: Request) -> tuple[int, int]:
    return (0, request.arrival)


def _by_priority(request: Request) -> tuple[int, int]:
    return (request.spec.params.priority, request.arrival)
