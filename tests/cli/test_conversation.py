"""Conversations as data, and as files."""

from __future__ import annotations

import json

import pytest

from paceline.cli.conversation import Conversation, load_conversation, save_conversation
from paceline.errors import ChatTemplateError, UsageError

TALK = (
    Conversation("Be brief.").say("user", "Hi").say("assistant", "Hello.").say("user", "Bye").say("assistant", "Bye.")
)


def test_the_system_message_comes_first_and_turns_are_the_users():
    assert [message["role"] for message in TALK.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert TALK.num_turns == 2
    assert Conversation().messages == []


def test_undo_takes_a_turn_back_and_unanswered_its_answer_alone():
    assert [message["content"] for message in TALK.undo().turns] == ["Hi", "Hello."]
    assert [message["content"] for message in TALK.unanswered().turns] == ["Hi", "Hello.", "Bye"]
    assert TALK.undo().undo() == Conversation("Be brief.")
    for method in (TALK.undo().undo().undo, Conversation().unanswered):
        with pytest.raises(UsageError, match="nothing was said yet"):
            method()


@pytest.mark.parametrize("talk", [TALK, Conversation().say("user", "Où est-ce?\n東京")], ids=["system", "unicode"])
def test_what_is_saved_is_loaded(tmp_path, talk):
    path = tmp_path / "talk.json"
    save_conversation(Conversation().say("user", "older"), path)
    save_conversation(talk, path)
    assert load_conversation(path) == talk
    assert json.loads(path.read_text()) == talk.messages
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_no_conversation_is_not_replaced(tmp_path):
    path = tmp_path / "thesis.json"
    path.write_text('{"chapters": 12}')
    with pytest.raises(UsageError, match="exists and is no saved conversation"):
        save_conversation(TALK, path)
    assert path.read_text() == '{"chapters": 12}'


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        save_conversation(TALK, tmp_path / "none" / "talk.json")


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"Hello", UsageError, "is no JSON file"),
        (b"\xff\xfe", UsageError, "is no JSON file"),
        (b"[]", ChatTemplateError, "at least one message"),
        (b'[{"role": "user", "content": 7}]', ChatTemplateError, r"messages\[0\].content must be a string"),
        (b'{"role": "user", "content": "Hi"}', ChatTemplateError, "must be a list"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, data, error, says):
    path = tmp_path / "talk.json"
    path.write_bytes(data)
    with pytest.raises(error, match=says):
        load_conversation(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none.json cannot be read: No such file"):
        load_conversation(tmp_path / "none.json")
