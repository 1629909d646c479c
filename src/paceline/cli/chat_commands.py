"""The /commands of a chat: a table of names, what they take and what they do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from paceline.cli.chat_session import ChatSession
from paceline.cli.conversation import Conversation, load_conversation, save_conversation
from paceline.cli.table import columns
from paceline.errors import UsageError
from paceline.registry import unknown

# Sampling parameters that mean something in a chat: n, logprobs and the like have no place in one streamed answer.
SETTABLE = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "bad_words",
    "seed",
    "max_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
)


@dataclass(frozen=True)
class Command:
    """`takes`: what follows the name, "" for nothing; optional in brackets."""

    takes: str
    help: str
    run: Callable[[ChatSession, str], None]


def run_command(session: ChatSession, line: str) -> None:
    """Run a line that begins with '/'. Raises UsageError for an unknown command or a wrong argument, EOFError to leave,
    and what the command raises."""
    name, _, argument = line.removeprefix("/").partition(" ")
    argument = argument.strip()
    command = COMMANDS.get(name)
    if command is None:
        hint = '/help lists them; between """ and """ a line is text, whatever it begins with'
        raise UsageError(f"{unknown('command', f'/{name}', [f'/{known}' for known in COMMANDS])}; {hint}")
    if argument and not command.takes:
        raise UsageError(f"/{name} takes nothing, got '{argument}'")
    if not argument and command.takes and not command.takes.startswith("["):
        raise UsageError(f"/{name} needs {command.takes}")
    command.run(session, argument)


def _help(session: ChatSession, _: str) -> None:
    rows = [(f"/{name} {command.takes}".rstrip(), command.help) for name, command in COMMANDS.items()]
    session.note(columns(rows))
    session.note('A line that ends in \\ goes on in the next; """ begins and ends a text of several lines.')
    session.note("Ctrl-C stops an answer and keeps what was said; Ctrl-D leaves.")


def _exit(session: ChatSession, _: str) -> None:
    raise EOFError


def _clear(session: ChatSession, _: str) -> None:
    session.conversation = replace(session.conversation, turns=())
    session.note(f"forgotten; {_system_is(session.conversation)}")


def _system(session: ChatSession, text: str) -> None:
    if text:
        session.set_system(None if text == '""' else text)
    session.note(_system_is(session.conversation))


def _system_is(conversation: Conversation) -> str:
    return "no system message" if conversation.system is None else f"system message: {conversation.system}"


def _regenerate(session: ChatSession, _: str) -> None:
    session.regenerate()


def _undo(session: ChatSession, _: str) -> None:
    session.conversation = session.conversation.undo()
    session.note(f"taken back; turns left: {session.conversation.num_turns}")


def _save(session: ChatSession, name: str) -> None:
    if not session.conversation.messages:
        raise UsageError("nothing was said yet")
    path = Path(name).expanduser()
    save_conversation(session.conversation, path)
    session.note(f"{len(session.conversation.messages)} messages in {path}")


def _load(session: ChatSession, name: str) -> None:
    loaded = load_conversation(Path(name).expanduser())
    tokens = session.context_tokens(loaded)  # refuses what the chat template cannot write
    session.conversation = loaded
    session.note(f"{len(loaded.messages)} messages, {tokens} of {session.max_context} tokens of context")
    if loaded.turns and loaded.turns[-1]["role"] == "user":
        session.note("the last message has no answer: /regenerate gives one")


def _set(session: ChatSession, argument: str) -> None:
    name, _, text = argument.partition(" ")
    name = name.replace("-", "_")
    if name not in SETTABLE:
        raise UsageError(unknown("sampling parameter", name, SETTABLE) + "; /params lists them")
    if not text:
        raise UsageError(f"/set {name} needs a value, or 'default'")
    given = {key: value for key, value in session.given.items() if key != name}
    session.set_params(given if text == "default" else {**given, name: _value(text.strip())})
    params, sources = session.params()
    session.note(f"{name} = {_shown(getattr(params, name))} ({sources.get(name, 'default')})")


def _value(text: str) -> object:
    """JSON where it is JSON ([1, 2], "1", 0.5), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return json.dumps(list(value), ensure_ascii=False)
    return "none" if value is None else str(value)


def _params(session: ChatSession, _: str) -> None:
    params, sources = session.params()
    session.note(columns([(name, _shown(getattr(params, name)), sources.get(name, "default")) for name in SETTABLE]))


def _stats(session: ChatSession, _: str) -> None:
    session.note(columns(session.stats()))


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "help": Command("", "this list", _help),
        "exit": Command("", "leave", _exit),
        "clear": Command("", "forget the conversation; the system message stays", _clear),
        "system": Command("[TEXT]", 'show or change the system message; "" takes it away', _system),
        "regenerate": Command("", "answer the last message anew", _regenerate),
        "undo": Command("", "take the last message and its answer back", _undo),
        "save": Command("FILE", "write the conversation as a JSON list of messages", _save),
        "load": Command("FILE", "go on with a saved conversation in place of this one", _load),
        "set": Command("NAME VALUE", "change a sampling parameter; VALUE 'default' forgets what was set", _set),
        "params": Command("", "the sampling parameters and where each comes from", _params),
        "stats": Command("", "speed, context used, what the prefix cache saved", _stats),
    }
)
