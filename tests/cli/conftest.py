"""Running the command line as a user does: a process, its two streams and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def paceline() -> Run:
    """paceline("generate", "Hi", stdin="...", env={...}) -> the finished process. Without stdin, there is none."""

    def run(
        *arguments: str, stdin: str | bytes | None = None, env: dict[str, str] | None = None, **options: Any
    ) -> Any:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        process = subprocess.run(
            [sys.executable, "-m", "paceline", *arguments],
            env={**os.environ, **(env or {})},
            capture_output=True,
            timeout=120,
            check=False,
            **({"stdin": subprocess.DEVNULL} if data is None else {"input": data}),
            **options,
        )
        process.stdout, process.stderr = process.stdout.decode(), process.stderr.decode()
        return process

    return run
