"""Lines into entries, and the history's file."""

from __future__ import annotations

import stat

import pytest

from paceline.cli.chat_input import HISTORY_LINES, Entry, append_history, piped_lines, read_entry, read_history
from paceline.errors import UsageError


def entries(text: str | bytes) -> list[Entry]:
    data = text.encode() if isinstance(text, str) else text
    read_line = piped_lines(data.splitlines(keepends=True))
    found = []
    while True:
        try:
            found.append(read_entry(read_line))
        except EOFError:
            return found


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        ("one\ntwo\r\nthree", ["one", "two", "three"]),
        ("one\\\ntwo\\\nthree\nfour\n", ["one\ntwo\nthree", "four"]),
        ('"""one\n\n  two"""\nthree\n', ["one\n\n  two", "three"]),
        ('"""\none\n"""\n', ["one"]),
        ('"""\n\none\n\n"""\n', ["\none\n"]),
        ('"""one""" \n', ["one"]),
        ('a """quote""" inside\n', ['a """quote""" inside']),
        ('"""\nends in \\\n"""\n', ["ends in \\"]),
        ("\n", [""]),
    ],
)
def test_entries(typed, texts):
    assert [entry.text for entry in entries(typed)] == texts


def test_only_what_begins_with_a_slash_is_a_command_and_never_between_quotes():
    found = entries('/help\n/system one\\\ntwo\n"""/usr/bin"""\n /usr/bin\n')
    assert [(entry.text, entry.is_command) for entry in found] == [
        ("/help", True),
        ("/system one\ntwo", True),
        ("/usr/bin", False),
        (" /usr/bin", False),
    ]


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ('"""never closed\n', 'the input ended before the closing """'),
        ("more to come\\\n", "the input ended after a line that ends in a backslash"),
        (b"fine\nb\xe4d\n", "line 2 of standard input is not UTF-8 text: byte 1 is 0xe4"),
    ],
)
def test_an_entry_without_its_end_is_an_error(typed, says):
    with pytest.raises(UsageError, match=says):
        entries(typed)


def test_the_history_is_for_its_owner_alone(tmp_path):
    path = tmp_path / "cache" / "chat_history"
    assert read_history(path) == []
    append_history(path, "first")
    append_history(path, "two\nlines")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert read_history(path) == ["first", "two", "lines"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_long_history_is_cut_to_its_newest_lines(tmp_path):
    path = tmp_path / "chat_history"
    path.write_text("".join(f"{n}\n" for n in range(2 * HISTORY_LINES)))
    assert len(read_history(path)) == HISTORY_LINES
    assert len(path.read_text().splitlines()) == 2 * HISTORY_LINES  # not rewritten at every start
    append_history(path, "last")
    assert read_history(path)[-1] == "last"
    assert path.read_text().splitlines() == [str(n) for n in range(HISTORY_LINES + 1, 2 * HISTORY_LINES)] + ["last"]
