"""A conversation as plain data: what was said, taken back, saved and loaded. No change in place: a turn that fails
leaves the conversation that was there before it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paceline.errors import PacelineError, UsageError
from paceline.tokens.chat_template import check_messages

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """`turns`: the messages without the system message, in order."""

    system: str | None = None
    turns: tuple[Message, ...] = ()

    @property
    def messages(self) -> list[Message]:
        """What the chat template gets."""
        first: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self.turns]

    @property
    def num_turns(self) -> int:
        """Messages of the user."""
        return sum(message["role"] == "user" for message in self.turns)

    def say(self, role: str, text: str) -> Conversation:
        return replace(self, turns=(*self.turns, {"role": role, "content": text}))

    def undo(self) -> Conversation:
        """Without the user's last message and all that followed it. Raises UsageError when there is none."""
        return replace(self, turns=self.turns[: self._last_user_message()])

    def unanswered(self) -> Conversation:
        """Without what followed the user's last message. Raises UsageError when there is none."""
        return replace(self, turns=self.turns[: self._last_user_message() + 1])

    def _last_user_message(self) -> int:
        for index in reversed(range(len(self.turns))):
            if self.turns[index]["role"] == "user":
                return index
        raise UsageError("nothing was said yet")


def save_conversation(conversation: Conversation, path: Path) -> None:
    """Write the messages as a JSON list, whole or not at all. An existing file that is no conversation is not replaced.

    Raises UsageError when that is so, or the file cannot be written.
    """
    if path.exists():
        try:
            load_conversation(path)
        except PacelineError:
            raise UsageError(f"{path} exists and is no saved conversation: choose another name") from None
    text = json.dumps(conversation.messages, ensure_ascii=False, indent=2) + "\n"
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def load_conversation(path: Path) -> Conversation:
    """Read a JSON list of messages; a system message in first place becomes the system text.

    Raises UsageError for a file that cannot be read, ChatTemplateError for messages of the wrong form.
    """
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise UsageError(f"{path} is no JSON file: {error}") from error
    checked = check_messages(messages)
    if checked[0]["role"] == "system" and isinstance(checked[0].get("content"), str):
        return Conversation(checked[0]["content"], tuple(checked[1:]))
    return Conversation(None, tuple(checked))
