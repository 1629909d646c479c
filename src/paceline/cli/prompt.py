"""Where a prompt comes from: the argument, or standard input."""

from __future__ import annotations

import sys

from paceline.errors import UsageError

_EXAMPLE = 'paceline generate "Why is the sky blue?"'


def read_prompt(argument: str | None) -> str:
    """The prompt: `argument`, or standard input (less its last line end) where that is '-' or missing.

    Raises UsageError when there is none, when it is empty, or when standard input is not UTF-8.
    """
    if argument is not None and argument != "-":
        text = argument
    elif sys.stdin is None or (argument is None and sys.stdin.isatty()):
        raise UsageError(f"no prompt: give one, as in {_EXAMPLE}, or pipe it in")
    else:
        text = _decode(sys.stdin.buffer.read())
    if not text.strip():
        raise UsageError(f"the prompt is empty: give some text, as in {_EXAMPLE}")
    return text


def _decode(data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}; convert it first"
        ) from None
    return text.removesuffix("\n").removesuffix("\r")
