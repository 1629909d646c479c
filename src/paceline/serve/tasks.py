"""Ends of asyncio's tasks: none outlives what started it. Python 3.10 has no TaskGroup."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel all and wait for their ends; what they raise is dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def run_together(jobs: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All to their ends, side by side; the first failure ends the others and is raised."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        await cancel(*tasks)
