"""`LLM` as a user meets it, on a tiny model with real weights, tokenizer and template."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from paceline.engine import build, model_runner
from paceline.engine.prompts import read_prompt
from paceline.errors import ChatTemplateError, ModelNotFoundError, OutOfMemoryError, PromptTooLongError, UsageError
from paceline.kernels import Choice
from paceline.kernels.gpu import GPU
from paceline.llm import LLM
from paceline.sampling.params import BeamSearchParams, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_directory: Path) -> Iterator[LLM]:
    with LLM(str(tiny_directory), device="cpu") as made:
        yield made


def make(directory: Path, **options: object) -> LLM:
    return LLM(str(directory), device="cpu", **options)  # type: ignore[arg-type]


def test_outputs_come_in_the_order_of_the_prompts(llm):
    prompts = ["abc", "hello", "zebra", "q"]
    outputs = llm.generate(prompts, GREEDY)
    assert [output.prompt for output in outputs] == prompts
    alone = [llm.generate(prompt, GREEDY)[0].outputs[0].text for prompt in prompts]
    assert [output.outputs[0].text for output in outputs] == alone
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)
    assert all(output.metrics.time_to_first_token > 0 for output in outputs)


def test_text_and_token_ids_are_the_same_prompt(llm):
    text = llm.generate("hello", GREEDY)[0]
    ids = llm.get_tokenizer().encode("hello")
    for prompt in (ids, {"prompt_token_ids": ids}, {"prompt": "hello"}):
        assert llm.generate(prompt, GREEDY)[0].outputs[0].token_ids == text.outputs[0].token_ids


def test_stream_adds_up_to_generate(llm):
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=20, n=2, logprobs=2)
    whole = llm.generate("hello", params)[0]
    parts = list(llm.stream("hello", params))
    for index in range(2):
        pieces = [part.outputs[index] for part in parts]
        assert "".join(piece.text for piece in pieces) == whole.outputs[index].text
        assert sum((tuple(piece.token_ids) for piece in pieces), ()) == tuple(whole.outputs[index].token_ids)
        assert sum((tuple(piece.logprobs) for piece in pieces), ()) == tuple(whole.outputs[index].logprobs)
    assert parts[-1].finished
    assert not parts[0].finished


def test_leaving_a_stream_early_frees_its_blocks(tiny_directory):
    with make(tiny_directory, enable_prefix_caching=False) as llm:
        for _ in llm.stream("hello", SamplingParams(max_tokens=50, ignore_eos=True)):
            break
        gc.collect()
        assert llm.model.engine.scheduler.stats.cache.used_blocks == (0,)
        assert not llm.model.engine.scheduler.has_unfinished


def test_chat_goes_through_the_template(llm):
    output = llm.chat([{"role": "user", "content": "hi"}], GREEDY)[0]
    assert output.prompt == "hi."
    many = llm.chat([[{"role": "user", "content": text}] for text in ("a", "b")], GREEDY)
    assert [one.prompt for one in many] == ["a.", "b."]


def test_generation_config_applies_where_nothing_is_given(llm):
    params, taken = llm.effective_sampling_params({"top_k": 9})
    assert (params.temperature, params.top_k, taken) == (0.5, 9, ["temperature"])
    assert llm.get_default_sampling_params().top_k == 5
    given = SamplingParams()
    assert llm.effective_sampling_params(given) == (given, [])


def test_generation_config_is_said_or_refused(tiny_directory, caplog):
    with make(tiny_directory, generation_config="none") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()
    assert not caplog.text
    with make(tiny_directory):
        assert "sets temperature=0.5, top_k=5 where a request sets nothing" in caplog.text


def test_every_listed_end_token_ends(llm):
    """generation_config lists 2 and 29: forced to either, the answer stops, and ignore_eos goes on."""
    for token in (2, 29):
        params = SamplingParams(allowed_token_ids=[token], max_tokens=5)
        answer = llm.generate("hello", params)[0].outputs[0]
        assert (answer.finish_reason, answer.stop_reason, list(answer.token_ids)) == ("stop", None, [token])
        assert answer.text == ""
        onwards = SamplingParams(allowed_token_ids=[token], max_tokens=5, ignore_eos=True)
        assert llm.generate("hello", onwards)[0].outputs[0].token_ids == (token,) * 5


def test_a_stop_token_is_named_and_its_text_left_out(llm):
    params = {"allowed_token_ids": [5], "stop_token_ids": [5], "max_tokens": 9, "min_tokens": 2}
    with pytest.raises(UsageError, match="max_tokens"):
        llm.generate("hello", {**params, "max_tokens": 1})
    answer = llm.generate("hello", SamplingParams(**{**params, "min_tokens": 0}))[0].outputs[0]
    assert (answer.finish_reason, answer.stop_reason, answer.text) == ("stop", 5, "")
    kept = llm.generate("hello", SamplingParams(**{**params, "min_tokens": 0}, include_stop_str_in_output=True))[0]
    assert kept.outputs[0].text == "c"


def test_a_stop_string_across_tokens(llm):
    params = SamplingParams(allowed_token_ids=[3], stop=["aaa"], max_tokens=9)
    answer = llm.generate("hello", params)[0].outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("", "stop", "aaa")
    assert len(answer.token_ids) == 3


def test_logprobs_hold_the_chosen_token_and_the_likeliest(llm):
    answer = llm.generate("hello", SamplingParams(temperature=0, max_tokens=3, logprobs=4))[0].outputs[0]
    assert [len(entry) for entry in answer.logprobs] == [4, 4, 4]
    for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
        assert entry[token].rank == 1
        assert entry[token].decoded_token == llm.get_tokenizer().decode([token], False)
    total = sum(entry[token].logprob for token, entry in zip(answer.token_ids, answer.logprobs, strict=True))
    assert answer.cumulative_logprob == pytest.approx(total)


def test_priority_orders_the_waiting(tiny_directory):
    """One at a time, least value first: the last prompt is served before the first."""
    with make(tiny_directory, max_num_seqs=1, scheduling_policy="priority") as llm:
        outputs = llm.generate(["abc", "abd", "abe"], GREEDY, priority=[3, 2, 1])
    finished = [output.metrics.last_token_time for output in outputs]
    assert finished == sorted(finished, reverse=True)


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("", None, "empty"),
        ([], None, None),
        (["a", ""], None, "empty"),
        ("a", [SamplingParams()] * 2, "2 sampling_params for 1 prompts"),
        ("a", {"temprature": 1}, "did you mean 'temperature'"),
        ("a", {"temperature": float("nan")}, "temperature"),
        ("a", {"temperature": -1}, "temperature"),
        ("a", SamplingParams(logit_bias={99: 1.0}), "token id 99, but the vocabulary ends at 31"),
        ("a\ud800", None, "Unicode|surrogate"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_runs(llm, prompts, params, message):
    if message is None:
        assert llm.generate(prompts, params) == []
        return
    with pytest.raises(UsageError, match=message):
        llm.generate(prompts, params)
    assert not llm.model.engine.scheduler.has_unfinished


def test_a_prompt_longer_than_the_context_names_both_lengths(llm):
    with pytest.raises(PromptTooLongError, match="has 130 tokens and the context holds 128"):
        llm.generate([3] * 130, GREEDY)
    cut = llm.generate([3] * 130, SamplingParams(truncate_prompt_tokens=10, max_tokens=1))[0]
    assert len(cut.prompt_token_ids) == 10


def test_generation_runs_to_the_contexts_end_and_no_further(llm):
    output = llm.generate([3] * 120, SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (8, "length")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_modle_len": 5}, UsageError, "did you mean 'max_model_len'"),
        ({"trust_remote_code": True}, UsageError, "trust_remote_code is refused"),
        ({"quantization": "int9"}, UsageError, "did you mean 'int8'"),
        ({"quantization": "int4", "offload": "disk"}, UsageError, "offload cannot stream int4 weights.*'int8'"),
        ({"max_model_len": 129}, UsageError, "129 is more than the 128 positions"),
        ({"generation_config": "vlm"}, UsageError, "generation_config"),
        ({"speculative_config": {"method": "ngram", "tokens": 3}}, UsageError, "speculative_config key 'tokens'"),
        ({"kv_cache_gib": 1e-6}, OutOfMemoryError, "lower max_model_len or raise kv_cache_gib"),
        ({"kv_cache_gib": 1e6}, OutOfMemoryError, "does not fit"),
        ({"threads": 0}, UsageError, "threads"),
        ({"dtype": "float8"}, UsageError, "dtype"),
        ({"max_num_batched_tokens": 3}, UsageError, "at least max_num_seqs"),
        ({"chat_template": "/no/such/file.jinja"}, UsageError, "file.jinja"),
    ],
)
def test_an_impossible_option_is_one_clear_line(tiny_directory, options, error, message):
    with pytest.raises(error, match=message) as raised:
        make(tiny_directory, **options)
    assert "\n" not in str(raised.value)


def test_a_model_too_large_is_told_before_it_is_loaded(tiny_directory, monkeypatch):
    monkeypatch.setattr(build, "available_bytes", lambda device: 10_000)
    monkeypatch.setattr(build, "load_decoder", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(OutOfMemoryError, match=r"needs .* for weights .* available on cpu"):
        make(tiny_directory)


def test_a_cache_that_finds_no_memory_says_what_to_do(tiny_directory, monkeypatch):
    def full(*arguments, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(model_runner, "allocate_kv", full)
    with pytest.raises(OutOfMemoryError, match=r"on cpu for a cache of .* GiB beside .*; set kv_cache_gib") as raised:
        make(tiny_directory)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("dtype", "level"), [(torch.bfloat16, logging.WARNING), (torch.float32, logging.INFO)])
def test_what_runs_without_our_kernels_on_a_gpu_is_told(dtype, level, caplog, monkeypatch):
    """Of a GPU that is not here. In float32 that is what the user asked for."""

    class OnGPU:
        device = torch.device("cuda")

        def choices(self, rows):
            return [Choice("qkv", "torch", "Triton is not installed"), Choice("norm", "Triton")]

    OnGPU.dtype = dtype
    monkeypatch.setattr(build, "gpu", lambda device: GPU("NVIDIA H100", 132, (9, 0)))
    weights = build._Weights(None, OnGPU(), 16, (1,), 0)
    with caplog.at_level("INFO", "paceline"):
        build._tell_fallbacks(weights, build.LoadOptions("model"))
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (level, "qkv: torch, since Triton is not installed")
    ]


def test_a_context_lowered_to_the_cache_is_said(tiny_directory, monkeypatch, caplog):
    """No wish of the user's: the model's own context is cut to what a share of the memory holds, with a warning."""
    monkeypatch.setattr(build, "available_bytes", lambda device: 400_000)
    with make(tiny_directory, max_num_batched_tokens=64, max_num_seqs=2) as llm:
        assert llm.model.engine.config.max_model_len < 128
    assert "max_model_len lowered" in caplog.text


def test_an_unknown_model_is_a_clear_error():
    with pytest.raises(ModelNotFoundError):
        LLM("no-such-model-anywhere", device="cpu")


def test_a_missing_template_is_no_guess(tiny_directory, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny_directory, bare)
    (bare / "tokenizer_config.json").write_text("{}")
    with make(bare) as llm, pytest.raises(ChatTemplateError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}], GREEDY)


def test_without_a_tokenizer_ids_go_in_and_out(tiny_directory):
    with make(tiny_directory, skip_tokenizer_init=True) as llm:
        answer = llm.generate([3, 4], GREEDY)[0].outputs[0]
        assert len(answer.token_ids) == 6
        assert answer.text == ""
        with pytest.raises(UsageError, match="no tokenizer"):
            llm.generate("text", GREEDY)


def test_close_lets_the_model_go(tiny_directory):
    with make(tiny_directory) as llm:
        decoder = weakref.ref(llm.model.engine.runner.model)
        llm.generate("a", GREEDY)
    assert decoder() is None
    with pytest.raises(UsageError, match="closed"):
        llm.generate("a", GREEDY)
    llm.close()


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_running_ahead_gives_the_same_text(llm, tiny_directory, depth):
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=30, stop=["q"])
    expected = [output.outputs[0].text for output in llm.generate(["abc", "hello", "x"], params)]
    with make(tiny_directory, async_depth=depth, max_num_seqs=2) as ahead:
        found = ahead.generate(["abc", "hello", "x"], params)
    assert [output.outputs[0].text for output in found] == expected


def test_a_slower_product_is_said(tiny_directory, monkeypatch, caplog):
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    with make(tiny_directory) as llm:
        llm.generate("a", GREEDY)
    assert "matrices run through plain torch: this torch was built without oneDNN" in caplog.text


def test_a_stopped_answer_computes_no_further_beside_a_longer_one(llm):
    short = SamplingParams(allowed_token_ids=[3], stop=["aaa"], max_tokens=30)
    long = SamplingParams(allowed_token_ids=[3], max_tokens=30)
    stopped, other = (output.outputs[0] for output in llm.generate(["hello", "hello"], [short, long]))
    assert (stopped.token_ids, len(other.token_ids)) == ((3, 3, 3), 30)


def test_a_stop_string_inside_accepted_drafts_cuts_the_tokens(tiny_directory):
    """Every token is an accepted draft or follows one; those after the stop string are not the answer's."""
    params = SamplingParams(allowed_token_ids=[3], stop=["aaaa"], max_tokens=30, logprobs=1)
    with make(tiny_directory, speculative_config={"method": "ngram", "num_speculative_tokens": 4}) as llm:
        answer = llm.generate("aaaaaaaa", params)[0].outputs[0]
    assert (answer.text, answer.token_ids, answer.stop_reason) == ("", (3,) * 4, "aaaa")
    assert len(answer.logprobs) == 4


def test_beam_search_is_vllms_call(llm):
    params = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)
    first, second = llm.beam_search(["hello", "q"], params)
    for output in (first, second):
        assert [answer.index for answer in output.outputs] == [0, 1, 2]
        scores = [answer.score for answer in output.outputs]
        assert scores == sorted(scores, reverse=True)
        assert scores == pytest.approx([answer.cumulative_logprob / 5 for answer in output.outputs])
        assert len({answer.text for answer in output.outputs}) == 3
        assert all(answer.logprobs is None and answer.finish_reason == "length" for answer in output.outputs)
    greedy = llm.generate("hello", SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=0))[0].outputs[
        0
    ]
    assert first.outputs[0].cumulative_logprob >= greedy.cumulative_logprob


def test_beams_have_the_log_probabilities_of_their_own_tokens(llm):
    params = {"use_beam_search": True, "n": 2, "max_tokens": 4, "logprobs": 2, "prompt_logprobs": 0}
    output = llm.generate("hello", params)[0]
    for answer in output.outputs:
        chosen = [entry[token].logprob for token, entry in zip(answer.token_ids, answer.logprobs, strict=True)]
        assert sum(chosen) == pytest.approx(answer.cumulative_logprob)
        path = [*output.prompt_token_ids, *answer.token_ids]
        scored = llm.generate(path, SamplingParams(max_tokens=0, prompt_logprobs=0))[0].prompt_logprobs[1:]
        forced = [entry[token].logprob for token, entry in zip(path[1:], scored, strict=True)]
        assert chosen == pytest.approx(forced[-len(chosen) :], abs=1e-4)
        known = [entry[token].logprob for token, entry in zip(path[1:], output.prompt_logprobs[1:], strict=False)]
        assert known == pytest.approx(forced[: -len(chosen)], abs=1e-4)


def test_best_of_returns_the_best_of_what_is_sampled(llm):
    given = {"temperature": 1.0, "top_k": 0, "seed": 7, "max_tokens": 8}
    every = llm.generate("hello", SamplingParams.from_dict({**given, "n": 6, "logprobs": 0}))[0].outputs
    assert len({len(answer.token_ids) for answer in every}) > 1  # or the two rankings below would be one
    for penalty in (1.0, 0.0):
        params = SamplingParams.from_dict({**given, "n": 2, "best_of": 6, "length_penalty": penalty})
        best = llm.generate("hello", params)[0].outputs
        ranked = sorted(every, key=lambda a: -a.cumulative_logprob / len(a.token_ids) ** penalty)
        assert [answer.token_ids for answer in best] == [answer.token_ids for answer in ranked[:2]]
        assert [answer.index for answer in best] == [0, 1]
        assert best[0].score == pytest.approx(ranked[0].cumulative_logprob / len(ranked[0].token_ids) ** penalty)
        assert best[0].cumulative_logprob == pytest.approx(ranked[0].cumulative_logprob)
        assert best[0].logprobs is None


@pytest.mark.parametrize("params", [{"use_beam_search": True, "n": 3}, {"best_of": 4, "n": 2, "seed": 1}])
def test_ranked_answers_are_streamed_once_at_their_end(llm, params):
    (only,) = llm.stream("hello", params)
    whole = llm.generate("hello", params)[0]
    assert only.finished
    assert [answer.text for answer in only.outputs] == [answer.text for answer in whole.outputs]


def test_leaving_beams_early_frees_their_blocks(tiny_directory):
    with make(tiny_directory, enable_prefix_caching=False) as llm:
        params = SamplingParams(use_beam_search=True, n=3, max_tokens=50, ignore_eos=True)
        state = llm._add(llm._checked(read_prompt("hello", llm.get_tokenizer()), params), params, None, chat=False)
        for _ in range(3):
            llm._step()
        llm._forget(state)
        assert llm.model.engine.scheduler.stats.cache.used_blocks == (0,)
        assert not llm.model.engine.scheduler.has_unfinished


def test_more_beams_than_sequences_are_refused(tiny_directory):
    with make(tiny_directory, max_num_seqs=2) as llm:
        with pytest.raises(UsageError, match=r"3 beams need .* max_num_seqs is 2: lower best_of \(or n\), or raise"):
            llm.beam_search("hello", BeamSearchParams(3, 5))
        assert llm.generate("hello", GREEDY)[0].finished
