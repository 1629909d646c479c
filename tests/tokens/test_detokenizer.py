"""A stream says exactly what decoding everything says, never a broken character, never a part of a stop string."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.tokens.detokenizer import Delta, IncrementalDetokenizer
from paceline.tokens.tokenizer import Tokenizer

KINDS = ["llama3", "qwen2", "llama2", "metaspace", "gemma"]
Load = Callable[..., Tokenizer]


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def stream(detokenizer: IncrementalDetokenizer, chunks: list[list[int]]) -> tuple[list[Delta], str]:
    deltas = [detokenizer.append(chunk) for chunk in chunks]
    return deltas, "".join(delta.text for delta in deltas) + detokenizer.finish()


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """Split `ids` into chunks of the given sizes, over and over."""
    chunks, at, i = [], 0, 0
    while at < len(ids):
        size = sizes[i % len(sizes)]
        chunks.append(ids[at : at + size])
        at, i = at + size, i + 1
    return chunks


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_deltas_concatenate_to_decode(kind: str, load: Load, data: st.DataObject) -> None:
    tokenizer = load(kind)
    any_token = st.integers(0, tokenizer.vocab_size + 1)  # two past the end: the embedding's padding
    byte_token = st.integers(0, 300)  # all kinds keep their bytes here: mostly broken characters
    ids = data.draw(st.lists(st.one_of(any_token, byte_token), max_size=30))
    skip = data.draw(st.booleans())
    chunks = cut(ids, data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    _, text = stream(IncrementalDetokenizer(tokenizer, skip_special_tokens=skip), chunks)
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)
    if tokenizer.backend.decoder.__class__.__name__ == "ByteLevel":  # the library's own decoding, to the letter
        assert text == tokenizer.backend.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(text=st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from(" 😀👍🏽中文é\u200d"))))
def test_real_text_comes_through_character_by_character(kind: str, load: Load, text: str) -> None:
    tokenizer = load(kind)
    ids = ids_of(tokenizer, text)
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    deltas, streamed = stream(detokenizer, [[i] for i in ids])
    assert streamed == tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert sum(d.text.count("\ufffd") for d in deltas) == text.count("\ufffd")


@pytest.mark.parametrize("kind", ["llama3", "gemma"])
def test_an_emoji_leaves_with_its_last_byte(kind: str, load: Load) -> None:
    tokenizer = load(kind)
    ids = ids_of(tokenizer, "😀")
    assert len(ids) == 4
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.append([i]).text for i in ids] == ["", "", "", "😀"]
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("kind", ["llama3", "gemma"])
def test_a_broken_character_is_said_when_it_is_known_to_be_broken(kind: str, load: Load) -> None:
    tokenizer = load(kind)
    ids = ids_of(tokenizer, "😀")
    (letter,) = ids_of(tokenizer, "x")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.append(ids[:3]).text == ""
    assert detokenizer.append([letter]).text == "\ufffdx"
    assert detokenizer.append(ids[:2]).text == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_the_space_a_sentencepiece_text_begins_with(load: Load) -> None:
    tokenizer = load("llama2")
    ids = ids_of(tokenizer, "the other")
    assert stream(IncrementalDetokenizer(tokenizer), [ids])[1] == "the other"
    assert stream(IncrementalDetokenizer(tokenizer, continues_prompt=True), [ids])[1] == " the other"
    bos = tokenizer.bos_token_id
    assert bos is not None
    assert stream(IncrementalDetokenizer(tokenizer, skip_special_tokens=False), [[bos, *ids]])[1] == "<s> the other"


# ------------------------------------------------------------------------------------------------- stop strings


def expected_with_stops(pieces: list[str], stops: list[str], include: bool, min_tokens: int) -> tuple[str, str | None]:
    """The slow twin: look at the text a character at a time."""
    text = ""
    for number, piece in enumerate(pieces, start=1):
        for char in piece:
            text += char
            ending = [stop for stop in stops if text.endswith(stop)]
            if ending and number > min_tokens:
                stop = max(ending, key=len)
                return (text if include else text.removesuffix(stop)), stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("ab x", max_size=24),
    stops=st.lists(st.text("ab x", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    include=st.booleans(),
    min_tokens=st.integers(0, 6),
)
def test_stop_strings_equal_a_search_by_character(
    load: Load, text: str, stops: list[str], sizes: list[int], include: bool, min_tokens: int
) -> None:
    tokenizer = load("llama3")
    ids = ids_of(tokenizer, text)
    pieces = [tokenizer.decode([i]) for i in ids]
    want, want_stop = expected_with_stops(pieces, stops, include, min_tokens)
    detokenizer = IncrementalDetokenizer(
        tokenizer, stop=tuple(stops), include_stop_str_in_output=include, min_tokens=min_tokens
    )
    said, kept, stop = "", 0, None
    for chunk in cut(ids, sizes):
        delta = detokenizer.append(chunk)
        said, kept = said + delta.text, kept + delta.num_kept
        assert want.startswith(said)  # nothing was said that had to be taken back
        if delta.stop is not None:
            stop = delta.stop
            break
    said += detokenizer.finish()
    assert (said, stop) == (want, want_stop)
    assert len("".join(pieces[:kept])) >= len(want)
    assert stop is not None or kept == len(ids)


def test_a_stop_across_tokens_says_how_many_drafts_it_keeps(load: Load) -> None:
    tokenizer = load("llama3")
    ids = [i for piece in ("a", "b", "S", "T", "O", "P", "c", "d") for i in ids_of(tokenizer, piece)]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=("STOP",))
    assert detokenizer.append(ids[:4]) == Delta("ab", None, 4)
    assert detokenizer.append(ids[4:]) == Delta("", "STOP", 2)
    assert detokenizer.append(ids[:1]) == Delta("", None, 0)
    assert detokenizer.finish() == ""


def test_a_stop_that_did_not_come_is_given_back(load: Load) -> None:
    tokenizer = load("llama3")
    detokenizer = IncrementalDetokenizer(tokenizer, stop=("STOP", ""))
    assert detokenizer.append(ids_of(tokenizer, "a STO")).text == "a "
    assert detokenizer.append(ids_of(tokenizer, "RM ST")).text == "STORM "
    assert detokenizer.finish() == "ST"


def test_min_tokens_lets_early_stops_pass(load: Load) -> None:
    tokenizer = load("llama3")
    ids = [i for piece in ("x", "y", "x", "y") for i in ids_of(tokenizer, piece)]
    for min_tokens, text, kept in [(0, "", 1), (1, "xy", 3), (2, "xy", 3), (3, "xyxy", 4)]:
        delta = IncrementalDetokenizer(tokenizer, stop=("x",), min_tokens=min_tokens).append(ids)
        assert (delta.text, delta.num_kept) == (text, kept)


def test_a_stop_let_pass_is_not_found_again_in_the_text_held_back(load: Load) -> None:
    tokenizer = load("llama3")
    ids = [i for piece in ("a", "b", "x") for i in ids_of(tokenizer, piece)]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=("abc", "b"), min_tokens=2)
    assert [detokenizer.append([i]) for i in ids] == [Delta("", None, 1), Delta("", None, 1), Delta("abx", None, 1)]


def test_of_two_stops_in_one_token_the_first_complete_one_wins(load: Load) -> None:
    tokenizer = load("llama3")
    (the,) = ids_of(tokenizer, " the")
    assert IncrementalDetokenizer(tokenizer, stop=("the", "h")).append([the]) == Delta(" t", "h", 1)


def test_the_cost_of_a_token_does_not_grow_with_the_text(load: Load) -> None:
    tokenizer = load("gemma")
    ids = [i for i in range(300) if i not in tokenizer.special_token_ids] * 10  # byte tokens, mostly broken

    def seconds(repeat: int) -> float:
        detokenizer = IncrementalDetokenizer(tokenizer, stop=("never comes",))
        started = time.process_time()
        for token_id in ids * repeat:
            detokenizer.append([token_id])
        return time.process_time() - started

    seconds(1)  # fill the memo of token bytes
    # Linear is 8 times, quadratic 64; the least of three, because other work shares the machine.
    assert min(seconds(8) for _ in range(3)) < 24 * min(seconds(1) for _ in range(3))
