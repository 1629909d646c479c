"""The tokenizer gives transformers' ids, joins every end-of-sequence id, and refuses what it cannot read."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import ChatTemplateError, CheckpointError, UnsupportedModelError, UsageError
from paceline.loading.resolve import ModelSource
from paceline.tokens.tokenizer import Tokenizer, load_tokenizer

KINDS = ["llama3", "qwen2", "llama2", "metaspace", "gemma"]
Load = Callable[..., Tokenizer]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_transformers(kind: str, load: Load, tokenizer_dirs: dict[str, Path], nasty_texts: list[str]) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load(kind), AutoTokenizer.from_pretrained(tokenizer_dirs[kind])
    for text in nasty_texts:
        for special in (True, False):
            assert ours.encode(text, add_special_tokens=special) == theirs.encode(text, add_special_tokens=special), (
                repr(text)
            )
    assert ours.encode_batch(nasty_texts) == [theirs.encode(text) for text in nasty_texts]
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )
    assert ours.vocab_size == len(theirs)
    assert ours.special_token_ids >= set(theirs.all_special_ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_decoding_equals_transformers(
    kind: str, skip: bool, load: Load, tokenizer_dirs: dict[str, Path], nasty_texts: list[str]
) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load(kind), AutoTokenizer.from_pretrained(tokenizer_dirs[kind])
    for text in nasty_texts:
        ids = theirs.encode(text)
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    if kind in ("llama3", "qwen2"):  # every id by itself, most of them broken characters
        for i in range(ours.vocab_size):
            assert ours.decode([i], skip) == theirs.decode([i], skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["llama3", "llama2", "gemma"])
def test_text_survives_the_round_trip(kind: str, load: Load, nasty_texts: list[str]) -> None:
    tokenizer = load(kind)
    for text in nasty_texts:
        # "▁" is how a SentencePiece vocabulary writes a space, and <0x41> how it writes a byte: not invertible.
        if "▁" not in text and "<0x" not in text:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_an_id_without_a_token_is_no_text(load: Load) -> None:
    tokenizer = load("llama3")
    ids = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 7]) == "hello"
    assert tokenizer.token_bytes(tokenizer.vocab_size + 7) is None
    assert tokenizer.token_string(-1) is None


def test_an_invalid_byte_spoils_only_itself(load: Load) -> None:
    tokenizer = load("gemma")
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in (*"😀".encode(), 0xFF, *"é".encode(), 0xE4, 0xB8)]
    assert tokenizer.decode([i for i in ids if i is not None]) == "😀\ufffdé\ufffd"


def test_end_ids_are_the_union_of_all_that_name_one(load: Load) -> None:
    tokenizer = load("llama3", generation_config={"eos_token_id": [7, 8]}, config={"eos_token_id": 9})
    assert tokenizer.eos_token_ids == {7, 8, 9, tokenizer.token_id("<|eot_id|>")}
    assert load("qwen2").eos_token_ids == {load("qwen2").token_id("<|im_end|>")}
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        load("llama3", generation_config={"eos_token_id": "</s>"})


def test_empty_text(load: Load) -> None:
    assert load("llama2").encode("", add_special_tokens=False) == []
    assert load("llama2").encode("") == [load("llama2").bos_token_id]
    assert load("qwen2").encode_batch([]) == []
    assert load("qwen2").decode([]) == ""


def test_a_lone_surrogate_is_refused_with_its_position(load: Load) -> None:
    for encode in (load("llama3").encode, lambda text: load("llama3").encode_batch(["fine", text])):
        with pytest.raises(UsageError, match=r"U\+D83D\) at character 3"):
            encode("abc\ud83d")
    with pytest.raises(UsageError, match="must be a string, got int"):
        load("llama3").encode(5)  # type: ignore[arg-type]


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer_dirs: dict[str, Path]) -> Callable[..., Any]:
    """A copy of the llama3 checkpoint with other files written beside it or over it."""

    def make(**files: str) -> Any:
        source = tokenizer_dirs["llama3"]
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_text((source / name).read_text())
        for name, text in files.items():
            file = tmp_path / name.replace("__", "/").replace("_DOT_", ".")
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        return ModelSource(name="test", kind="directory", path=tmp_path)

    return make


def test_a_missing_or_corrupt_tokenizer_says_what_to_do(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    def load_it(source: Any) -> Tokenizer:
        return load_tokenizer(source, generation_config={}, config={})

    with pytest.raises(CheckpointError, match=r"tokenizer\.json is corrupt"):
        load_it(checkpoint(tokenizer_DOT_json='{"model": '))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not valid JSON"):
        load_it(checkpoint(tokenizer_config_DOT_json="{"))
    with pytest.raises(CheckpointError, match="must hold a JSON object, it holds a list"):
        load_it(checkpoint(tokenizer_config_DOT_json="[]"))
    for malformed in (
        {"added_tokens_decoder": {"five": {"content": "<a>"}}},
        {"added_tokens_decoder": {"5": {}}},
        {"added_tokens_decoder": [1]},
        {"extra_special_tokens": 5},
        {"chat_template": [{"name": "default"}]},
    ):
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json has an entry of the wrong form"):
            load_it(checkpoint(tokenizer_config_DOT_json=json.dumps(malformed)))
    source = checkpoint()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json: copy it"):
        load_it(source)
    (tmp_path / "tokenizer.model").write_bytes(b"sp")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model but no tokenizer\.json: convert it"):
        load_it(source)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "qwen.tiktoken").write_bytes(b"bpe")
    with pytest.raises(CheckpointError, match=r"qwen\.tiktoken but no tokenizer\.json: convert it"):
        load_it(source)


def test_tokens_beyond_the_models_vocabulary_are_said(
    load: Callable[..., Tokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load("llama3")
    base = tokenizer.backend.get_vocab_size(with_added_tokens=False)
    (end,) = tokenizer.eos_token_ids
    assert end < min(tokenizer.special_token_ids - {0, end})
    with caplog.at_level("INFO"):
        assert tokenizer.for_vocabulary(tokenizer.vocab_size) is tokenizer
        assert not caplog.records
        assert tokenizer.for_vocabulary(end + 1) is tokenizer
        said = [(record.levelno, record.getMessage()) for record in caplog.records]
        caplog.clear()
        cut = tokenizer.for_vocabulary(end)
    assert [level for level, _ in said] == [logging.INFO, logging.WARNING]
    assert f"adds tokens that the model's vocabulary of {end + 1} has not ('<|im_start|>'" in said[0][1]
    assert f"has {base} tokens and the model {end + 1}" in said[1][1]
    assert cut.eos_token_ids == frozenset()
    assert cut.encode("hello there") == tokenizer.encode("hello there")
    assert f"end-of-sequence ids [{end}] are not in the model's vocabulary of {end}: ignored" in caplog.text


def test_a_decoder_that_is_of_no_kind_is_refused(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    source = checkpoint()
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["decoder"] = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UnsupportedModelError, match="decoder CTC"):
        load_tokenizer(source, generation_config={}, config={})


def test_limits_left_in_the_file_do_not_cut_prompts(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    source = checkpoint()
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert len(load_tokenizer(source, generation_config={}, config={}).encode("hello " * 50)) > 50


def test_tokens_that_only_tokenizer_config_declares(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "the",  # a plain vocabulary entry becomes special
        "added_tokens_decoder": {
            "500": {"content": "<tool>", "special": False, "lstrip": True, "rstrip": False, "normalized": False}
        },
        "additional_special_tokens": ["<|extra|>"],
        "add_bos_token": False,  # tokenizer.json decides: it adds one
    }
    source = checkpoint(tokenizer_config_DOT_json=json.dumps(config))
    ours = load_tokenizer(source, generation_config={}, config={})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("call  <tool> now", "say <|extra|> the other", "plain"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert ours.encode("x")[0] == ours.bos_token_id


def test_where_chat_templates_come_from(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    def load_it(source: Any, chat_template: str | None = None) -> Tokenizer:
        return load_tokenizer(source, generation_config={}, config={}, chat_template=chat_template)

    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(ChatTemplateError, match="no chat template"):
        load_it(checkpoint()).apply_chat_template(messages)

    named = [{"name": "default", "template": "D{{ bos_token }}"}, {"name": "tool_use", "template": "T"}]
    several = load_it(checkpoint(tokenizer_config_DOT_json=json.dumps({"bos_token": "B", "chat_template": named})))
    assert several.apply_chat_template(messages) == "DB"
    assert several.apply_chat_template(messages, tools=[]) == "T"
    assert several.apply_chat_template(messages, template="tool_use") == "T"
    assert several.apply_chat_template(messages, template="{{ messages[0].content + x }}", x="!") == "hi!"

    no_default = json.dumps({"chat_template": named[1:]})
    with pytest.raises(ChatTemplateError, match="name one of tool_use"):
        load_it(checkpoint(tokenizer_config_DOT_json=no_default)).apply_chat_template(messages)

    file = checkpoint(tokenizer_config_DOT_json=json.dumps({"chat_template": "S"}), chat_template_DOT_jinja="F")
    assert load_it(file).chat_template == "F"
    assert load_it(file, chat_template="{{ 1 }}").chat_template == "{{ 1 }}"
    assert load_it(file, chat_template=str(tmp_path / "chat_template.jinja")).chat_template == "F"
    with pytest.raises(ChatTemplateError, match="the chat template does not compile: line 1"):
        load_it(file, chat_template="{% for x in %}")
    with pytest.raises(ChatTemplateError, match="neither a Jinja template nor a readable file"):
        load_it(file, chat_template="nowhere.jinja")


def test_encode_chat_adds_no_second_bos(load: Load) -> None:
    tokenizer = load("llama3", chat_template="{{ bos_token }}{{ messages[0].content }}")
    ids = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert ids == tokenizer.encode("hello")
    assert ids.count(tokenizer.bos_token_id or 0) == 1


def test_importing_the_tokenizer_is_light() -> None:
    code = (
        "import sys, paceline.tokens.tokenizer, paceline.tokens.detokenizer\n"
        "print([name for name in ('torch', 'transformers', 'jinja2') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
