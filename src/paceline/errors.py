"""Every error a user can meet. Each message says what was wrong, where, and what to do, in one line.

`exit_code` is what the command line returns: 2 for a request that could not be right (usage), 1 for a
run that failed.
"""


class PacelineError(Exception):
    """Base of all errors raised on purpose. Anything else that escapes is a bug."""

    exit_code = 1


class UsageError(PacelineError, ValueError):
    """An argument, option, sampling parameter or prompt that cannot be right."""

    exit_code = 2


class PromptTooLongError(UsageError):
    """A prompt that does not fit the context; the message names both lengths."""


class ModelNotFoundError(PacelineError):
    """A model name that resolves to nothing: no such directory, file, alias or hub repository."""


class DownloadError(PacelineError):
    """The network, the hub or the package index failed; nothing half-written is left behind."""


class CheckpointError(PacelineError):
    """A checkpoint that is corrupt, truncated, incomplete or of the wrong shape."""


class UnsupportedModelError(PacelineError):
    """An architecture or a feature of a checkpoint that paceline does not implement."""


class ChatTemplateError(UsageError):
    """No chat template, or one that refuses the given messages."""


class OutOfMemoryError(PacelineError):
    """The model or its cache does not fit; told before loading where it can be computed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how Python, torch or a device's driver says that no memory is left."""
    told = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in told)
    )


class EngineError(PacelineError):
    """A request failed inside the engine (NaN logits, device error); other requests go on."""


class EngineDeadError(PacelineError):
    """No engine takes or finishes a request: it is loading, hangs, is being restarted, drains, or is gone."""


class QueueFullError(PacelineError):
    """Too many requests or tokens wait already. `retry_after`: seconds after which to ask again."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
