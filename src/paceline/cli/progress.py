"""Progress of a download or a load, drawn with rich on stderr: stdout carries the answer alone."""

from __future__ import annotations

import sys

import rich.console
import rich.progress


class TerminalProgress:
    """paceline.loading.resolve.Progress on a terminal; the bar is removed when done."""

    def __init__(self) -> None:
        self._bar: rich.progress.Progress | None = None
        self._task = rich.progress.TaskID(0)

    def start(self, label: str, total_bytes: int | None) -> None:
        self.done()
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            console=rich.console.Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(label, total=total_bytes)
        self._bar.start()

    def advance(self, num_bytes: int) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, num_bytes)

    def done(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def terminal_progress(quiet: bool) -> TerminalProgress | None:
    """A bar where somebody can see it and wants it; None draws none."""
    return TerminalProgress() if sys.stderr is not None and sys.stderr.isatty() and not quiet else None
