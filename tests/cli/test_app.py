"""The command line before any model: what it refuses, with which words and exit codes, and what it imports."""

from __future__ import annotations

import os
import subprocess
import sys

import click
import pytest

import paceline.cli.app as app
from paceline.errors import CheckpointError, PromptTooLongError


def one_line_error(process: subprocess.CompletedProcess[str], *, code: int) -> str:
    assert process.returncode == code, process.stderr
    assert process.stdout == ""
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1, process.stderr
    return process.stderr


def test_version(paceline):
    from paceline import __version__

    assert paceline("--version").stdout == f"paceline, version {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "--temprature", "0.5", "Hi"], "did you mean '--temperature'?"),
        (["generate", "--zzzzzz", "Hi"], "unknown option '--zzzzzz'"),
        (["genrate", "Hi"], "did you mean 'generate'?"),
        (["Why is the sky blue?"], 'for a prompt: paceline generate "Why is the sky blue?"'),
        (["generate", "Why", "is", "the", "sky"], "quote the prompt"),
        (["generate", ""], "the prompt is empty"),
        (["generate", "  \n"], "the prompt is empty"),
        (["generate", "--temperature", "nan", "Hi"], "temperature must be a number at least 0, got nan"),
        (["generate", "--temperature", "-1", "Hi"], "temperature must be a number at least 0, got -1.0"),
        (["generate", "--temperature", "hot", "Hi"], "'hot' is not a valid float"),
        (["generate", "--top-p", "1.5", "Hi"], "top_p must be a number in (0, 1]"),
        (["generate", "--max-tokens", "0", "Hi"], "max_tokens must be an integer of at least 1"),
        (["generate", "--max-tokens", "2", "--min-tokens", "3", "Hi"], "min_tokens (3) must not exceed max_tokens (2)"),
        (["generate", "--stop", "", "Hi"], "stop must not hold an empty string"),
        (["generate", "--threads", "0", "Hi"], "--threads"),
        (["generate", "--dtype", "float31", "Hi"], "float32"),
        (["generate", "--quantize", "int3", "Hi"], "int8"),
        (["generate", "--raw", "--system", "Be brief.", "Hi"], "--system needs the chat template"),
        (["generate", "--raw", "--chat-template", "t.jinja", "Hi"], "--chat-template and --raw contradict each other"),
        (["generate", "--ignore-eos", "Hi"], "--ignore-eos needs --max-tokens"),
        (["generate", "--max-tokens"], "requires an argument"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2_before_torch_loads(arguments, says, capsys):
    code = app.main(arguments)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert says in captured.err


def test_an_error_reaches_the_shell(paceline):
    assert "did you mean '--seed'?" in one_line_error(paceline("generate", "--sed", "1", "Hi"), code=2)


def test_a_pipe_without_a_prompt_is_an_empty_prompt(paceline):
    assert "the prompt is empty" in one_line_error(paceline("generate", stdin=""), code=2)


def test_standard_input_that_is_not_utf8_names_the_byte(paceline):
    assert "byte 3 is 0xff" in one_line_error(paceline("generate", "-", stdin=b"abc\xffd"), code=2)


def test_underscore_and_dash_are_the_same(capsys):
    assert app.main(["generate", "--max_tokens", "0", "Hi"]) == 2
    assert "max_tokens must be an integer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (PromptTooLongError("9 tokens\nfor 8"), 2, "error: 9 tokens for 8\n"),
        (CheckpointError("model.gguf is cut short"), 1, "error: model.gguf is cut short\n"),
        (MemoryError(), 1, "error: out of memory"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (ZeroDivisionError("oops"), 1, "error: unexpected ZeroDivisionError: oops (a bug in paceline; --debug"),
        (KeyboardInterrupt(), 130, ""),
        (click.Abort(), 130, ""),
    ],
)
def test_every_exception_becomes_one_line_and_a_code(error, code, says, monkeypatch, capsys):
    def fails(context: click.Context) -> None:
        raise error

    monkeypatch.setattr(app.commands, "invoke", fails)
    assert app.main(["generate", "Hi"]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(says)
    assert captured.err.count("\n") == (1 if says else 0)


def test_debug_shows_the_traceback(monkeypatch, capsys):
    def fails(context: click.Context) -> None:
        raise CheckpointError("cut short")

    monkeypatch.setattr(app.commands, "invoke", fails)
    assert app.main(["generate", "--debug", "Hi"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "error: cut short"


def test_a_prompt_after_the_double_dash_is_no_option(monkeypatch, capsys):
    def fails(context: click.Context) -> None:
        raise CheckpointError("cut short")

    monkeypatch.setattr(app.commands, "invoke", fails)
    assert app.main(["generate", "--", "--debug"]) == 1
    assert capsys.readouterr().err == "error: cut short\n"


def test_a_closed_pipe_is_quiet():
    """`paceline generate --help | head -0`: the reader is gone before the first byte."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "paceline", "generate", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # buffered, or nothing would be left for the interpreter's end
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert process.returncode == 141
    assert process.stderr == b""


SWALLOWED_DURING_THE_IMPORT = """
import os, signal, sys, time

class AsTorchDoes:  # an interrupt within the import of torch is swallowed, at some of its places
    def find_spec(self, name, path=None, target=None):
        if name == "paceline.llm":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
            except KeyboardInterrupt:
                pass

sys.meta_path.insert(0, AsTorchDoes())
from paceline.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("arguments", [["generate", "Hi", "--model", "/no/such.gguf"], ["chat", "/no/such.gguf"]])
def test_an_interrupt_that_an_import_swallows_ends_the_program_all_the_same(arguments):
    process = subprocess.run(
        [sys.executable, "-c", SWALLOWED_DURING_THE_IMPORT, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (process.returncode, process.stdout, process.stderr) == (130, b"", b"")
