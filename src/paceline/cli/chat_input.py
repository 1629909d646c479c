"""What the user types in a chat: lines from a terminal or a pipe, several of them joined into one entry, and the
history that the arrow keys go through."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import click

from paceline.errors import UsageError
from paceline.loading.wheel import cache_dir

PROMPT, MORE = "> ", ". "
QUOTES = '"""'
HISTORY_LINES = 1000  # kept when a chat begins

ReadLine = Callable[[str], str]  # prompt -> line without its end; EOFError when there are no more


@dataclass(frozen=True)
class Entry:
    """What was typed before an answer. `quoted`: between triple quotes, so a text whatever it begins with."""

    text: str
    quoted: bool = False

    @property
    def is_command(self) -> bool:
        return not self.quoted and self.text.startswith("/")


def read_entry(read_line: ReadLine) -> Entry:
    """One entry: a line; lines joined where one ends in a backslash; or all between triple quotes.

    Raises EOFError when there is none, UsageError when the input ends inside one.
    """
    line = read_line(PROMPT)
    if line.startswith(QUOTES):
        return Entry(_quoted(line.removeprefix(QUOTES), read_line), quoted=True)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(_more(read_line, "after a line that ends in a backslash"))
    return Entry("\n".join(lines))


def _quoted(first: str, read_line: ReadLine) -> str:
    lines = [first]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(_more(read_line, f"before the closing {QUOTES}"))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines).removeprefix("\n").removesuffix("\n")  # the quotes may stand on lines of their own


def _more(read_line: ReadLine, where: str) -> str:
    try:
        return read_line(MORE)
    except EOFError:
        raise UsageError(f"the input ended {where}: nothing was sent") from None


def piped_lines(data: Iterable[bytes]) -> ReadLine:
    """Lines of standard input that is no terminal; no prompt is shown. Raises UsageError for one that is not UTF-8."""
    numbered = enumerate(data, 1)

    def read_line(prompt: str) -> str:
        number, line = next(numbered, (0, None))
        if line is None:
            raise EOFError
        try:
            return line.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"line {number} of standard input is not UTF-8 text: byte {error.start} is "
                f"0x{line[error.start]:02x}; convert it first"
            ) from None

    return read_line


def terminal_lines(words: Sequence[str], history: Path | None) -> ReadLine:
    """Lines from a terminal, edited by readline where Python has it. Tab completes `words`. `history` None keeps
    none; a file that cannot be used is said once."""
    readline = _readline(words)
    if history is not None:
        history = _begin_history(history, readline)

    def read_line(prompt: str) -> str:
        nonlocal history
        if not sys.stdout.isatty():  # then input() writes the prompt there, among the answers
            click.echo(prompt, nl=False, err=True)
            prompt = ""
        try:
            line = input(prompt)
        except UnicodeDecodeError as error:
            raise UsageError(f"what you typed is not {error.encoding}: set the terminal to UTF-8") from None
        if history is not None and line.strip():
            try:
                append_history(history, line)
            except OSError as error:
                _say_no_history(history, error)
                history = None
        return line

    return read_line


def _readline(words: Sequence[str]) -> ModuleType | None:
    try:
        import readline  # loading it is what gives input() its line editing
    except ImportError:  # Windows, and some builds
        return None

    def complete(text: str, state: int) -> str | None:
        matches = [word for word in words if word.startswith(text)] if text else []
        return matches[state] if state < len(matches) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    return readline


# -------------------------------------------------------------------------------------------------------- history


def history_path() -> Path:
    return cache_dir() / "chat_history"


def _begin_history(path: Path, readline: ModuleType | None) -> Path | None:
    try:
        lines = read_history(path)
    except OSError as error:
        _say_no_history(path, error)
        return None
    if readline is not None:
        for line in lines:
            readline.add_history(line)
    return path


def _say_no_history(path: Path, error: OSError) -> None:
    click.echo(f"warning: no history, {path} cannot be used ({error.strerror})", err=True)


def read_history(path: Path) -> list[str]:
    """The last lines typed, oldest first; the file is made where there is none, for its owner's eyes alone, and cut to
    HISTORY_LINES once it has twice as many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    path.chmod(0o600)  # also where it was made with other rights
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if len(lines) > 2 * HISTORY_LINES:
        path.write_text("".join(f"{line}\n" for line in lines[-HISTORY_LINES:]), encoding="utf-8")
    return lines[-HISTORY_LINES:]


def append_history(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8", errors="replace") as file:
        file.write(f"{line}\n")
