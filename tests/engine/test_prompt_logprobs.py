"""prompt_logprobs, echo and max_tokens=0 as a user of `LLM` meets them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline import sizing
from paceline.errors import OutOfMemoryError, PromptTooLongError
from paceline.llm import LLM
from paceline.sampling.params import SamplingParams

GREEDY = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(tiny_directory: Path) -> Iterator[LLM]:
    with LLM(str(tiny_directory), device="cpu") as made:
        yield made


def expected_logprobs(directory: Path, token_ids: list[int]) -> list[float]:
    """Of each token but the first, by transformers."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = model(torch.tensor([token_ids])).logits[0].log_softmax(dim=-1)
    return [logprobs[i, token].item() for i, token in enumerate(token_ids[1:])]


def test_a_prompts_log_probabilities(llm, tiny_directory):
    output = llm.generate("hello", SamplingParams(**GREEDY, prompt_logprobs=2))[0]
    first, *rest = output.prompt_logprobs
    assert first is None
    ids = list(output.prompt_token_ids)
    found = [entry[token].logprob for entry, token in zip(rest, ids[1:], strict=True)]
    assert found == pytest.approx(expected_logprobs(tiny_directory, ids), abs=1e-4)
    for entry, token in zip(rest, ids[1:], strict=True):
        assert [one.rank for one in entry.values()][:2] == [1, 2]
        assert entry[token].decoded_token == llm.get_tokenizer().decode([token], False)
    assert llm.generate("hello", SamplingParams(**GREEDY))[0].prompt_logprobs is None
    everything = llm.generate("hello", SamplingParams(**GREEDY, prompt_logprobs=-1))[0].prompt_logprobs
    assert [len(entry) for entry in everything[1:]] == [32] * 4


def test_echo_begins_with_the_prompt_and_its_log_probabilities(llm):
    plain = llm.generate("hello", SamplingParams(**GREEDY, logprobs=1, prompt_logprobs=1))[0]
    echoed = llm.generate("hello", SamplingParams(**GREEDY, logprobs=1, echo=True))[0]
    answer, with_echo = plain.outputs[0], echoed.outputs[0]
    assert with_echo.text == "hello" + answer.text
    assert with_echo.token_ids == (*plain.prompt_token_ids, *answer.token_ids)
    assert with_echo.logprobs == (*plain.prompt_logprobs, *answer.logprobs)
    assert with_echo.cumulative_logprob == answer.cumulative_logprob
    assert echoed.prompt_logprobs == plain.prompt_logprobs
    silent = llm.generate("hello", SamplingParams(**GREEDY, echo=True))[0]
    assert (silent.prompt_logprobs, silent.outputs[0].logprobs) == (None, None)


def test_nothing_is_generated_for_max_tokens_0(llm):
    output = llm.generate("hello", SamplingParams(max_tokens=0, echo=True, logprobs=0))[0]
    answer = output.outputs[0]
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("hello", output.prompt_token_ids, "length")
    assert [entry is None for entry in answer.logprobs] == [True] + [False] * 4
    assert output.metrics.first_token_time is None
    scored = llm.generate("h", SamplingParams(max_tokens=0, prompt_logprobs=0))[0]
    assert (scored.prompt_logprobs, scored.outputs[0].text, scored.outputs[0].token_ids) == ([None], "", ())


def test_a_prompt_that_fills_the_context_can_be_scored(llm):
    output = llm.generate([3] * 128, SamplingParams(max_tokens=0, prompt_logprobs=0))[0]
    assert len(output.prompt_logprobs) == 128
    with pytest.raises(PromptTooLongError):
        llm.generate([3] * 129, SamplingParams(max_tokens=0, prompt_logprobs=0))
    with pytest.raises(PromptTooLongError):
        llm.generate([3] * 128, SamplingParams(max_tokens=1, prompt_logprobs=0))


def test_what_is_echoed_of_ids_and_of_a_cut_prompt(llm):
    ids = llm.get_tokenizer().encode("hello")
    assert llm.generate(ids, SamplingParams(max_tokens=0, echo=True))[0].outputs[0].text == "hello"
    cut = llm.generate("hello", SamplingParams(max_tokens=0, echo=True, truncate_prompt_tokens=2, logprobs=0))[0]
    assert (cut.outputs[0].text, len(cut.outputs[0].logprobs)) == ("lo", 2)


def test_a_stop_string_is_not_looked_for_in_the_echo(llm):
    params = SamplingParams(allowed_token_ids=[3], stop=["ell", "aaa"], max_tokens=9, echo=True)
    answer = llm.generate("hello", params)[0].outputs[0]
    assert (answer.text, answer.stop_reason) == ("hello", "aaa")


@pytest.mark.parametrize("options", [{}, {"max_chunk": 2}, {"max_chunk": 4, "async_depth": 2}, {"max_num_seqs": 1}])
def test_a_stream_has_the_prompts_part_once_and_first(tiny_directory, options):
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=6, n=2, logprobs=2, echo=True)
    with LLM(str(tiny_directory), device="cpu", **options) as llm:
        whole = llm.generate("hello", params)[0]
        parts = list(llm.stream("hello", params))
    assert [part.prompt_logprobs for part in parts] == [whole.prompt_logprobs] + [None] * (len(parts) - 1)
    for index in range(2):
        pieces = [part.outputs[index] for part in parts]
        assert pieces[0].text.startswith("hello")
        assert "".join(piece.text for piece in pieces) == whole.outputs[index].text
        assert sum((tuple(piece.token_ids) for piece in pieces), ()) == whole.outputs[index].token_ids
        assert sum((tuple(piece.logprobs) for piece in pieces), ()) == whole.outputs[index].logprobs


def test_without_text_the_echo_is_token_ids(tiny_directory):
    with LLM(str(tiny_directory), device="cpu", skip_tokenizer_init=True) as llm:
        output = llm.generate([3, 4, 5], SamplingParams(max_tokens=0, echo=True, logprobs=1))[0]
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", (3, 4, 5))
    assert output.prompt_logprobs[1][4].decoded_token is None


def test_the_workspace_is_kept_free(tiny_directory, monkeypatch):
    monkeypatch.setattr(sizing, "logprob_workspace_bytes", lambda vocab_size, num_rows: 1 << 60)
    with pytest.raises(OutOfMemoryError, match="for a step"):
        LLM(str(tiny_directory), device="cpu")
