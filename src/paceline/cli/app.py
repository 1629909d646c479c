"""`paceline`: the commands, and the one place where an exception becomes a line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

from paceline import __version__
from paceline.cli.batch import batch
from paceline.cli.bench import bench
from paceline.cli.bench_serve import bench_serve
from paceline.cli.chat import chat
from paceline.cli.env import env
from paceline.cli.exit_codes import EXIT_CLOSED_PIPE, EXIT_FAILURE, EXIT_INTERRUPTED
from paceline.cli.explain import explain
from paceline.cli.generate import generate
from paceline.cli.group import NearestGroup
from paceline.cli.models import models
from paceline.cli.optimize import optimize
from paceline.cli.plan import plan
from paceline.cli.serve import serve
from paceline.cli.tune import tune
from paceline.errors import PacelineError
from paceline.registry import unknown


class _Commands(NearestGroup):
    def hint(self, name: str) -> str:
        return f'; for a prompt: paceline generate "{name}"'


@click.group(
    cls=_Commands,
    # Underscore and dash are the same: --max_tokens is --max-tokens.
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
@click.version_option(__version__, prog_name="paceline")
def commands() -> None:
    """Run transformer language models fast, in native PyTorch and Triton."""


commands.add_command(generate)
commands.add_command(plan)
commands.add_command(chat)
commands.add_command(models)
commands.add_command(env)
commands.add_command(batch)
commands.add_command(bench)
bench.add_command(bench_serve)
commands.add_command(explain)
commands.add_command(optimize)
commands.add_command(serve)
commands.add_command(tune)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for a failure, 2 for usage, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments[: arguments.index("--") if "--" in arguments else None]
    try:
        # Not click's own main(): it prints usage errors on three lines and answers a closed pipe with exit code 1.
        with commands.make_context("paceline", arguments) as context:
            commands.invoke(context)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # What is still buffered has no reader; without this the interpreter would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED_PIPE
    except Exception as error:
        return _report(error, debug)
    return 0


def _report(error: Exception, debug: bool) -> int:
    """One line on stderr (the traceback before it with --debug), and the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, click.ClickException):
        message, code = _click_message(error), error.exit_code
    elif isinstance(error, PacelineError):
        message, code = str(error), error.exit_code
    elif isinstance(error, MemoryError):
        message, code = "out of memory: use a smaller model, --max-model-len or --quantize int8", EXIT_FAILURE
    elif isinstance(error, OSError):
        message, code = str(error), EXIT_FAILURE
    else:
        hint = "" if debug else "; --debug shows where"
        message, code = f"unexpected {type(error).__name__}: {error} (a bug in paceline{hint})", EXIT_FAILURE
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code


def _click_message(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    if context is None:
        return error.format_message()
    if isinstance(error, click.NoSuchOption):
        known = [name for option in context.command.params for name in option.opts if name.startswith("--")]
        message = unknown("option", error.option_name, known)
    else:
        message = error.format_message().rstrip(".")
    return f"{message}; see '{context.command_path} --help'"
