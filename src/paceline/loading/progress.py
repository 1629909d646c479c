"""How a long transfer tells whoever watches. The library shows nothing by itself; the command line draws a bar."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """One transfer: start once, advance as bytes arrive, done at the end, also after a failure."""

    def start(self, label: str, total_bytes: int) -> None: ...

    def advance(self, n: int) -> None: ...

    def done(self) -> None: ...


class Silent:
    """A Progress that shows nothing."""

    def start(self, label: str, total_bytes: int) -> None:
        pass

    def advance(self, n: int) -> None:
        pass

    def done(self) -> None:
        pass
