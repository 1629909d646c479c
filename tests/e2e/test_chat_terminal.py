"""`paceline chat` as a person has it: a terminal with line editing, history and Ctrl-C."""

from __future__ import annotations

import os
import pty
import select
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.default_model

# The terminal becomes the one that Ctrl-C is sent from.
TAKE_TERMINAL_AND_RUN = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from paceline.cli import main
sys.exit(main())
"""
UP, CTRL_C, CTRL_D = b"\x1b[A", b"\x03", b"\x04"


class Terminal:
    """A process on a pseudo-terminal of its own: what it shows, and what is typed."""

    def __init__(self, *arguments: str, cache: Path) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL_AND_RUN, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "PACELINE_CACHE": str(cache), "TERM": "xterm"},
            start_new_session=True,
        )
        os.close(slave)

    def until(self, text: str, seconds: float = 60) -> str:
        """What appears up to and with `text`."""
        seen, stop = b"", time.monotonic() + seconds
        while text.encode() not in seen:
            assert select.select([self.master], [], [], max(0, stop - time.monotonic()))[0], seen.decode()
            try:
                seen += os.read(self.master, 1)  # byte by byte: nothing after `text` is taken
            except OSError:  # the process ended
                raise AssertionError(f"no {text!r} in {seen.decode()!r}") from None
        return seen.decode()

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def interrupt(self, text: str) -> str:
        """Ctrl-C at a line being typed, and what it shows. CPython looks for signals and then waits for a key: on a
        busy machine a signal may come in between, and is noticed with the next key."""
        for _ in range(12):
            self.type(CTRL_C)
            if select.select([self.master], [], [], 5)[0]:
                break
        return self.until(text)


def test_a_conversation_in_a_terminal(default_model_gguf, tmp_path):
    (tmp_path / "chat_history").write_text("What is the capital of France?\n")
    terminal = Terminal(
        "chat", str(default_model_gguf), "--temperature", "0", "--max-model-len", "1024", cache=tmp_path
    )
    try:
        assert "context of 1024 tokens · /help" in terminal.until("> ")
        terminal.type(UP + b"\r")  # from the history of an earlier session
        assert "The capital of France is Paris." in terminal.until(" of 1024")
        terminal.until("> ")
        terminal.type(b'"""Tell me a very long story\rabout the sea."""\r')
        terminal.until('sea."""')
        for _ in range(3):  # words of the answer
            terminal.until(" ")
        terminal.type(CTRL_C)
        assert "stopped" in terminal.until(" of 1024")
        terminal.until("> ")
        terminal.type(b"half a li")
        terminal.until("half a li")
        terminal.interrupt("/exit leaves")
        terminal.until("> ")
        terminal.type(b"/st\t\r")  # Tab completes
        assert "2 in the conversation, 2 answered" in terminal.until("all prompts")
        terminal.until("> ")
        terminal.type(b"/nothing\r")
        terminal.until("error: unknown command '/nothing'")
        terminal.until("> ")
        terminal.type(CTRL_D)
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
    history = tmp_path / "chat_history"
    assert history.read_text().splitlines()[1:] == [
        "What is the capital of France?", '"""Tell me a very long story', 'about the sea."""', "/stats", "/nothing"
    ]  # fmt: skip
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
