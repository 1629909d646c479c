"""A SchedulerOutput as the driver sends it to the ranks: of block tables only what changed. No torch.

256 requests of 4,096 tokens have 65,536 block numbers; a step in which none changes sends none of them.
"""

from __future__ import annotations

from typing import Any

from paceline.engine.step import ScheduledRequest, SchedulerOutput

Tables = tuple[tuple[int, ...], ...]
Message = tuple[Any, ...]
"""Of one step, plain values that pickle at once."""


class Sender:
    """Remembers what the other side knows."""

    def __init__(self) -> None:
        self._tables: dict[str, Tables] = {}

    def encode(self, output: SchedulerOutput) -> Message:
        for request_id in output.finished:
            self._tables.pop(request_id, None)
        rows = [self._row(request) for request in output.scheduled]
        return rows, output.new_requests, output.copies, output.finished, output.branches

    def _row(self, request: ScheduledRequest) -> tuple[Any, ...]:
        known, tables = self._tables.get(request.request_id), request.block_tables
        changes: list[tuple[int, tuple[int, ...]]] | None = None
        if tables is not known:
            before = known or ((),) * len(tables)
            changes = [_change(old, new) for old, new in zip(before, tables, strict=True)]
            self._tables[request.request_id] = tables
        scored = request.scored
        span = (scored.start, scored.stop) if scored else None
        return request.request_id, request.start, request.token_ids, request.num_drafts, request.samples, changes, span


class Receiver:
    """The other side: block tables that did not change are the same objects as in the step before."""

    def __init__(self) -> None:
        self._tables: dict[str, Tables] = {}

    def decode(self, message: Message) -> SchedulerOutput:
        rows, new_requests, copies, finished, branches = message
        for request_id in finished:
            self._tables.pop(request_id, None)
        return SchedulerOutput(tuple(map(self._request, rows)), new_requests, copies, finished, branches)

    def _request(self, row: tuple[Any, ...]) -> ScheduledRequest:
        request_id, start, token_ids, num_drafts, samples, changes, span = row
        if changes is not None:
            before = self._tables.get(request_id) or ((),) * len(changes)
            self._tables[request_id] = tuple(
                old[:keep] + tail for old, (keep, tail) in zip(before, changes, strict=True)
            )
        scored = range(0) if span is None else range(*span)
        return ScheduledRequest(request_id, start, token_ids, num_drafts, samples, self._tables[request_id], scored)


def _change(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """How many blocks at the begin stay, and those after them."""
    keep = len(old)
    if new[:keep] != old:
        keep = next(i for i, pair in enumerate(zip(old, (*new, None), strict=False)) if pair[0] != pair[1])
    return keep, new[keep:]
