"""`paceline chat` on the real default model: turns, commands, interrupts, a full context, a pipe."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import paceline.cli.chat_session as module
from paceline.cli.app import main
from paceline.cli.chat_commands import COMMANDS, SETTABLE, run_command
from paceline.cli.chat_session import ChatSession, dimmed
from paceline.errors import ChatTemplateError, PromptTooLongError, UsageError
from paceline.sampling.params import FIELD_NAMES

pytestmark = pytest.mark.default_model


@pytest.fixture(scope="module")
def llm(default_model_gguf: Path) -> Iterator[object]:
    from paceline.llm import LLM

    with LLM(str(default_model_gguf), device="cpu", max_model_len=160, max_num_seqs=1) as made:
        yield made


@pytest.fixture
def session(llm) -> ChatSession:
    llm.model.engine.scheduler.reset_prefix_cache()
    return ChatSession(llm, {"temperature": 0.0, "max_tokens": 8}, None, quiet=False)


def contents(session: ChatSession) -> list[str]:
    return [message["content"] for message in session.conversation.turns]


def test_a_turn_streams_to_stdout_and_the_next_finds_it_cached(session, capsys):
    session.say("What is the capital of France?")
    first = capsys.readouterr()
    assert first.out.rstrip("\n") == contents(session)[1]
    assert "Paris" in first.out
    assert first.err.count("\n") == 1
    assert " 0 cached · context " in first.err
    session.say("And of Italy?")
    assert session.last.last.num_cached_tokens >= 32
    assert contents(session)[2] == "And of Italy?"
    # The prompt is the template's text of all four messages so far: nothing was dropped.
    assert "capital of France" in session.last.last.prompt
    assert contents(session)[1] in session.last.last.prompt
    used = len(session.last.last.prompt_token_ids) + len(session.last.token_ids)
    assert f"{session.last.last.num_cached_tokens} cached · context {used} of 160\n" in capsys.readouterr().err


def test_stats_count_what_was_cached(session, capsys):
    session.say("Hi")
    session.say("Hi")
    rows = dict(session.stats())
    assert rows["turns"] == "2 in the conversation, 2 answered"
    assert rows["context"].startswith(f"{session.context_tokens()} of 160 tokens")
    last = session.last.last
    assert rows["last prompt"] == f"{last.num_cached_tokens} of {len(last.prompt_token_ids)} tokens from the cache"
    assert "tokens/s" in rows["answers"]


def test_quiet_prints_the_answer_alone(session, capsys):
    session.quiet = True
    session.say("Hi")
    assert capsys.readouterr().err == ""


def test_ctrl_c_keeps_what_was_said_and_the_session(session, capsys, monkeypatch):
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "write_stdout", write)
    before = signal.getsignal(signal.SIGINT)
    session.say("What is the capital of France?")
    assert signal.getsignal(signal.SIGINT) is before
    assert contents(session)[1] == "".join(pieces[:3])
    assert len(pieces) == 4  # three, and the line's end
    assert "stopped" in capsys.readouterr().err
    assert not session.llm.model.engine.scheduler.has_unfinished
    session.say("And of Italy?")
    assert len(contents(session)) == 4


def test_ctrl_c_before_the_first_word_takes_the_message_back(session, capfd, monkeypatch):
    stream = session.llm.stream

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)  # while the prompt is read
        yield from stream(*arguments)

    monkeypatch.setattr(session.llm, "stream", interrupted)
    session.set_params({**session.given, "stop": ["The capital of"]})  # which keeps the first word back
    session.say("What is the capital of France?")
    assert contents(session) == []
    captured = capfd.readouterr()
    assert captured.out == "\n"
    assert "stopping once the prompt is read" in captured.err
    assert "stopped before the first word" in captured.err


def test_a_full_context_is_said_and_no_turn_dropped(session, capsys):
    session.set_params({"temperature": 0.0})
    session.conversation = session.conversation.say("user", "one two " * 30).say("assistant", "three four " * 15)
    before = session.conversation
    with pytest.raises(
        PromptTooLongError, match=r"not sent: .* has \d+ tokens and the context holds 160.*/undo.*/clear"
    ):
        session.say("five six " * 20)
    assert session.conversation is before
    session.say("Write a poem.")
    assert len(contents(session)) == 4
    assert "cut off where the context ends" in (said := capsys.readouterr().err)
    assert "the context is full" in said
    with pytest.raises(PromptTooLongError):
        session.say("Go on.")
    run_command(session, "/undo")
    assert session.conversation == before


def test_regenerate_answers_the_same_message(session, capsys):
    with pytest.raises(UsageError, match="nothing was said yet"):
        run_command(session, "/regenerate")
    session.say("Hi")
    first = contents(session)
    run_command(session, "/regenerate")
    assert contents(session) == first
    assert "with temperature 0 the answer is the same again" in capsys.readouterr().err
    session.set_params({"temperature": 3.0, "max_tokens": 8})
    run_command(session, "/regenerate")
    assert len(contents(session)) == 2
    assert contents(session)[1] != first[1]


def test_undo_clear_and_system(session, capsys):
    session.say("Hi")
    run_command(session, "/system You are a pirate.")
    assert session.conversation.messages[0] == {"role": "system", "content": "You are a pirate."}
    assert len(contents(session)) == 2
    run_command(session, "/undo")
    assert contents(session) == []
    session.say("Hi")
    assert "You are a pirate." in session.last.last.prompt
    run_command(session, "/clear")
    assert [message["role"] for message in session.conversation.messages] == ["system"]
    run_command(session, '/system ""')
    assert session.conversation.messages == []
    assert capsys.readouterr().err.endswith("no system message\n")


def test_save_and_load(session, capsys, tmp_path):
    session.say("Hi")
    saved = session.conversation
    run_command(session, f"/save {tmp_path / 'my talk.json'}")
    run_command(session, "/clear")
    run_command(session, f"/load {tmp_path / 'my talk.json'}")
    assert session.conversation == saved
    assert f"2 messages, {session.context_tokens()} of 160 tokens" in capsys.readouterr().err
    (tmp_path / "open.json").write_text('[{"role": "user", "content": "Hi"}]')
    run_command(session, f"/load {tmp_path / 'open.json'}")
    assert "/regenerate gives one" in capsys.readouterr().err
    run_command(session, "/regenerate")
    assert contents(session) == ["Hi", saved.turns[1]["content"]]


def test_set_and_params(session, capsys):
    run_command(session, "/set top-k 3")
    assert capsys.readouterr().err == "top_k = 3 (request)\n"
    run_command(session, '/set stop ["\\n", "END"]')
    run_command(session, "/set max_tokens default")
    assert session.given == {"temperature": 0.0, "top_k": 3, "stop": ["\n", "END"]}
    capsys.readouterr()
    run_command(session, "/params")
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().err.splitlines()}
    assert tuple(rows) == SETTABLE
    assert rows["top_k"] == ["3", "request"]
    assert rows["max_tokens"] == ["none", "paceline", "chat"]
    assert rows["top_p"] == ["1.0", "default"]
    assert set(SETTABLE) <= set(FIELD_NAMES)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/set temperature -1", "temperature must be a number at least 0, got -1"),
        ("/set temperature hot", "temperature must be a number at least 0, got 'hot'"),
        ("/set temprature 1", "did you mean 'temperature'"),
        ("/set n 2", "unknown sampling parameter 'n'"),
        ("/set top_k", "needs a value"),
        ('/set logit_bias {"999999": 1}', "the vocabulary ends at 49151"),
        ("/set", "/set needs NAME VALUE"),
        ("/save", "/save needs FILE"),
        ("/save x.json", "nothing was said yet"),
        ("/load /no/such.json", "cannot be read"),
        ("/undo 2", "/undo takes nothing, got '2'"),
        ("/undoo", "did you mean '/undo'"),
        ("/usr/bin/env is what?", 'between """ and """ a line is text'),
    ],
)
def test_a_wrong_command_changes_nothing(session, line, says):
    given, conversation = session.given, session.conversation
    with pytest.raises(UsageError) as caught:
        run_command(session, line)
    assert says in str(caught.value)
    assert (session.given, session.conversation) == (given, conversation)


def test_help_lists_every_command(session, capsys):
    run_command(session, "/help")
    text = capsys.readouterr().err
    assert all(f"/{name}" in text and command.help in text for name, command in COMMANDS.items())


def test_a_model_without_a_chat_template_is_refused_with_what_to_do(llm, monkeypatch):
    monkeypatch.setattr(llm.get_tokenizer(), "chat_templates", {})
    with pytest.raises(ChatTemplateError, match=r"base model\?.*--chat-template FILE.*paceline generate --raw --model"):
        ChatSession(llm, {}, None, quiet=True)


def test_a_template_that_refuses_a_system_message_keeps_the_old_one(session, monkeypatch):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ messages }}"
    monkeypatch.setattr(session.llm.get_tokenizer(), "chat_templates", {"default": template})
    with pytest.raises(ChatTemplateError, match="no system role"):
        run_command(session, "/system Be brief.")
    assert session.conversation.system is None


def test_a_pipe_gets_answers_alone_and_ends_at_the_first_error(paceline, default_model_gguf, tmp_path):
    talk = tmp_path / "talk.json"
    process = paceline(
        "chat", str(default_model_gguf), "--temperature", "0", "--max-tokens", "6", "--quiet", "--max-model-len", "160",
        stdin=f'What is the capital\\\nof France?\n\n/save {talk}\n/set top_p 7\nnever said\n',
        env={"PACELINE_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert process.returncode == 2
    assert process.stdout == "The capital of France is Paris\n"
    assert process.stderr.splitlines()[1:] == ["error: top_p must be a number in (0, 1], got 7"]
    assert '"What is the capital\\nof France?"' in talk.read_text()
    assert not (tmp_path / "chat_history").exists()


def test_no_color_is_honoured(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert dimmed("Hi") == "\x1b[2mHi\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert dimmed("Hi") == "Hi"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a.gguf", "--model", "b.gguf"], "two models: 'a.gguf' and --model 'b.gguf'"),
        (["--raw"], "paceline generate --raw"),
        (["--top-p", "2"], "top_p must be a number in (0, 1]"),
        (["--temprature", "1"], "did you mean '--temperature'"),
    ],
)
def test_usage_errors(arguments, says, capsys):
    assert main(["chat", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
    assert captured.err.count("\n") == 1
