"""`paceline chat`: a conversation, answers streamed to stdout; all else goes to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from paceline.cli.chat_commands import COMMANDS, run_command
from paceline.cli.chat_input import Entry, history_path, piped_lines, read_entry, terminal_lines
from paceline.cli.chat_session import ChatSession, check_text
from paceline.cli.model import load_model
from paceline.cli.options import configure_logging, debug_option, engine_options, given_sampling, sampling_options
from paceline.errors import PacelineError, UsageError
from paceline.sampling.params import SamplingParams


@click.command()
@click.argument("name", required=False, metavar="[MODEL]")
@sampling_options
@engine_options
@click.option("--system", metavar="TEXT", help="A system message before the conversation.")
@click.option(
    "--no-history", is_flag=True, help="Neither read nor write chat_history in paceline's cache (readable by you only)."
)
@click.option("--raw", is_flag=True, hidden=True, help="Refused, with where to find it.")
@click.option("--quiet", is_flag=True, help="No progress and no lines of figures.")
@debug_option
@click.pass_context
def chat(context: click.Context, /, name: str | None, **options: Any) -> None:
    """Talk with MODEL: a hub id, a directory, a GGUF file or an alias (see paceline models).

    Each line is a message. A line that ends in a backslash goes on in the next, and a text of several lines stands
    between \"\"\" and \"\"\". A line that begins with / is a command: /help lists them. Ctrl-C stops an answer and
    keeps what was said; Ctrl-D or /exit leaves.

    Piped in, each line is a message too; nothing but the answers goes to standard output, and the first error ends it.
    """
    configure_logging(options["debug"])
    if name is not None:
        if context.get_parameter_source("model") is not ParameterSource.DEFAULT:
            raise UsageError(f"two models: '{name}' and --model '{options['model']}'; give one of them")
        options["model"] = name
    if options["raw"]:
        raise UsageError("a chat needs a chat template; without one, as for a base model: paceline generate --raw")
    if sys.stdin is None:
        raise UsageError("chat needs a standard input; for one answer: paceline generate")
    given = given_sampling(options)
    SamplingParams.from_dict({"max_tokens": None, **given})  # refuse a bad value now, before seconds of loading
    with load_model(options) as llm:
        session = ChatSession(llm, given, options["system"], quiet=options["quiet"])
        if not sys.stdin.isatty():
            read_piped = piped_lines(sys.stdin.buffer)
            _converse(session, lambda: read_entry(read_piped))
            return
        words = [f"/{command}" for command in COMMANDS]
        read_line = terminal_lines(words, None if options["no_history"] else history_path())
        model = llm.model
        session.note(
            f"{model.source.name} · {str(model.dtype).removeprefix('torch.')} on {model.device} · context of "
            f"{session.max_context} tokens · /help lists the commands, Ctrl-D leaves"
        )
        _converse_with_a_person(session, lambda: read_entry(read_line))


def _converse(session: ChatSession, read: Callable[[], Entry]) -> None:
    """Answer each entry until there are no more."""
    while True:
        try:
            _handle(session, read())
        except EOFError:
            return


def _converse_with_a_person(session: ChatSession, read: Callable[[], Entry]) -> None:
    """The same, but after an error, which is one line, the conversation goes on."""
    while True:
        try:
            _handle(session, _typed(read))
        except EOFError:
            return
        except PacelineError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)


def _typed(read: Callable[[], Entry]) -> Entry:
    """What a person types next. Ctrl-C empties the line; the shell's prompt, or the next, begins on one of its own."""
    try:
        return read()
    except KeyboardInterrupt:
        click.echo("\n(Ctrl-D or /exit leaves)", err=True)
        return Entry("")
    except EOFError:
        click.echo(err=True)
        raise


def _handle(session: ChatSession, entry: Entry) -> None:
    text = check_text(entry.text)
    if entry.is_command:
        run_command(session, text)
    elif text.strip():
        session.say(text)
