"""Run a measurement in a process of its own, which answers in a file. No torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paceline.errors import EngineError, PacelineError, UsageError

# A worker that gets stuck (a compiler, a driver) must not hang the others.
WORKER_SECONDS = 1800.0


def run_process(module: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """What `python -m MODULE FILE` answers to `data`. Raises UsageError or EngineError with what it says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        try:
            process = subprocess.run(
                [sys.executable, "-m", module, str(path)],
                input=json.dumps(data),
                capture_output=True,
                text=True,
                check=False,
                timeout=WORKER_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise EngineError(f"its process was ended after {WORKER_SECONDS / 60:.0f} minutes") from None
        if not path.exists():
            lines = process.stderr.strip().splitlines() or ["it said nothing"]
            raise EngineError(f"its process ended with code {process.returncode}: {lines[-1]}")
        answer = json.loads(path.read_text())
    if "error" in answer:
        raise (UsageError if answer["exit_code"] == UsageError.exit_code else EngineError)(answer["error"])
    result: dict[str, Any] = answer["result"]
    return result


def answer_in_file(run: Callable[[Any], Any]) -> int:
    """The process's side: a JSON on stdin, given to `run`, whose dataclass goes to the file that argv names."""
    (path,) = sys.argv[1:]
    try:
        answer: dict[str, Any] = {"result": dataclasses.asdict(run(json.load(sys.stdin)))}
    except PacelineError as error:
        answer = {"error": str(error), "exit_code": error.exit_code}
    except Exception as error:  # another engine's: whatever it raises is its row's
        traceback.print_exc()
        first_line = (str(error).strip().splitlines() or [""])[0]
        answer = {"error": f"{type(error).__name__}: {first_line}", "exit_code": PacelineError.exit_code}
    Path(path).write_text(json.dumps(answer))
    return 0
