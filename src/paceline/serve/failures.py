"""Errors of paceline.errors as messages, and back."""

from __future__ import annotations

from paceline import errors
from paceline.errors import EngineDeadError, PacelineError, QueueFullError
from paceline.serve.messages import Failure


def failure_of(error: Exception) -> Failure:
    retry_after = error.retry_after if isinstance(error, QueueFullError) else 0.0
    return Failure(type(error).__name__, str(error), retry_after)


def error_of(failure: Failure) -> PacelineError:
    """The error again; an EngineDeadError where its class is none of ours."""
    kind = getattr(errors, failure.kind, None)
    if kind is QueueFullError:
        return QueueFullError(failure.message, failure.retry_after)
    if isinstance(kind, type) and issubclass(kind, PacelineError):
        return kind(failure.message)
    return EngineDeadError(f"{failure.kind}: {failure.message}")
