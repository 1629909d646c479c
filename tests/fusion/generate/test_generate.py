"""Our loop behind `model.generate` returns what transformers' own returns."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import generation

import paceline
from paceline.fusion import generate as fused
from paceline.fusion.generate import cache as static_cache
from paceline.fusion.generate import transformers_names as names
from paceline.fusion.generate.step import FixedStep

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Inputs = Callable[[Any, int], dict[str, torch.Tensor]]
TOKENS = 12

LONG = {"length_penalty": 3.0}
# What is asked of `generate`; each is checked for greedy or beams as it says.
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams 2": {"num_beams": 2},
    "beams 4": {"num_beams": 4},
    "early stopping": {"num_beams": 4, "early_stopping": True},
    "never early": {"num_beams": 4, "early_stopping": "never", **LONG},
    "short ones": {"num_beams": 4, "length_penalty": -1.0, "num_return_sequences": 3},
    "several returned": {"num_beams": 4, "num_return_sequences": 2},
    "no repeats, greedy": {"no_repeat_ngram_size": 2},
    "no repeats, beams": {"num_beams": 4, "no_repeat_ngram_size": 2},
    "least length": {"min_new_tokens": 8},
    "least length, beams": {"num_beams": 3, "min_length": 9},
    "forced ends": {"num_beams": 3, "forced_eos_token_id": 7, "forced_bos_token_id": 9},
    "bad words": {"bad_words_ids": [[12], [21, 27], [10, 4]], "repetition_penalty": 1.3},
    "bad words, beams": {"num_beams": 4, "bad_words_ids": [[12], [21, 27], [10, 4]], "repetition_penalty": 1.3},
    "suppressed": {"num_beams": 2, "suppress_tokens": [10, 12, 30, 999], "begin_suppress_tokens": [21, 27]},
    "no end": {"num_beams": 2, "eos_token_id": None},
    "almost all ends": {"num_beams": 4, "eos_token_id": list(range(4, 58)), "early_stopping": "never", **LONG},
}


@contextmanager
def ours(
    model: Any, refuse: Callable[[str], None] | None = None, note: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Fails where a call goes to transformers' own loop, unless `refuse` takes the reason, and at notes likewise."""

    def fail(reason: str) -> None:
        raise AssertionError(f"not our loop: {reason}")

    report = SimpleNamespace(leave=refuse or fail, note=note or fail)
    vars(model)["generate"] = fused.Generate(model, SimpleNamespace(report=report))
    try:
        yield
    finally:
        del vars(model)["generate"]


def both(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """What transformers returns and what we do, from one seed."""
    kwargs.setdefault("max_new_tokens", TOKENS)
    torch.manual_seed(5)
    expected = model.generate(*args, **kwargs)
    torch.manual_seed(5)
    with ours(model):
        return expected, model.generate(*args, **kwargs)


def held(output: Any) -> list[torch.Tensor]:
    """What the cache of a result holds."""
    cache = output["past_key_values"]
    tensors = [
        tensor
        for part in (cache.self_attention_cache, cache.cross_attention_cache)
        for layer in part.layers
        for tensor in (layer.keys, layer.values)
    ]
    assert tensors
    return tensors


def ends_seen(model: Any, inputs: dict[str, torch.Tensor]) -> list[int]:
    """Tokens at which greedy texts of the rows end at different steps."""
    texts = model.generate(**inputs, max_new_tokens=TOKENS, eos_token_id=None)[:, -TOKENS:]
    return [int(row[3 + 3 * index]) for index, row in enumerate(texts)]


@pytest.mark.parametrize(
    ("options", "batch"), [*((name, 3) for name in OPTIONS), *((name, 1) for name in ("greedy", "beams 2", "beams 4"))]
)
def test_tokens_are_those_of_transformers(model: Any, inputs: Inputs, options: str, batch: int) -> None:
    arguments = inputs(model, batch)
    if "eos_token_id" not in OPTIONS[options]:
        arguments["eos_token_id"] = ends_seen(model, arguments)
    expected, got = both(model, **arguments, **OPTIONS[options])
    assert torch.equal(got, expected), f"{got.tolist()} is not {expected.tolist()}"


def test_rows_end_at_different_steps(model: Any, inputs: Inputs) -> None:
    """The test above has what it is for: rows whose ends lie apart."""
    arguments = inputs(model, 3)
    ends = ends_seen(model, arguments)
    # Whisper's texts come without what follows their ends, but for those of a plain call.
    plain = functools.partial(generation.GenerationMixin.generate, model)
    texts = plain(**arguments, eos_token_id=ends, max_new_tokens=TOKENS, pad_token_id=59)
    assert len({int((row != 59).sum()) for row in texts}) > 1


@pytest.mark.parametrize("beams", [1, 3])
def test_sampling_draws_what_transformers_draws_from_a_seed(model: Any, inputs: Inputs, beams: int) -> None:
    options = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.7, "num_beams": beams}
    expected, got = both(model, **inputs(model, 3), **options)
    assert torch.equal(got, expected)


def test_several_samples_of_a_sentence(model: Any, inputs: Inputs) -> None:
    expected, got = both(model, **inputs(model, 2), do_sample=True, num_return_sequences=3)
    assert got.shape[0] == 6
    assert torch.equal(got, expected)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_output_object(encoder_decoders: dict[str, Any], inputs: Inputs, name: str, beams: int) -> None:
    """All that transformers' object holds, and nothing of it changes when the model generates again."""
    model = encoder_decoders[name]
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "num_beams": beams}
    kwargs = {**inputs(model, 2), **wanted, "max_new_tokens": TOKENS, "early_stopping": beams > 1}
    kwargs["eos_token_id"] = ends_seen(model, inputs(model, 2))
    expected = model.generate(**kwargs)
    with ours(model):
        got = model.generate(**kwargs)
        model.generate(**{**kwargs, "input_ids": kwargs["input_ids"].flip(1)})
    assert type(got) is type(expected)
    assert got.keys() == expected.keys()
    for key in ("sequences", "sequences_scores", "beam_indices"):
        if key in expected:
            torch.testing.assert_close(got[key], expected[key])
    for key in ("scores", "logits"):
        torch.testing.assert_close(got[key], expected[key], atol=1e-5, rtol=1e-5)
    for a, b in zip(held(got), held(expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_prompt_for_the_decoder(encoder_decoders: dict[str, Any], inputs: Inputs) -> None:
    for name in ("t5", "bart", "marian"):
        model = encoder_decoders[name]
        prompt = torch.tensor([[model.config.decoder_start_token_id, 8, 11]]).repeat(3, 1)
        for beams in (1, 3):
            expected, got = both(model, **inputs(model, 3), decoder_input_ids=prompt, num_beams=beams)
            assert torch.equal(got, expected), (name, beams)


def test_encoder_outputs_that_are_given(encoder_decoders: dict[str, Any], inputs: Inputs) -> None:
    for name in ("t5", "bart"):
        model = encoder_decoders[name]
        given = inputs(model, 3)
        encoded = model.get_encoder()(**given, return_dict=True)
        for beams in (1, 3):
            kwargs = {"attention_mask": given["attention_mask"], "num_beams": beams, "max_new_tokens": TOKENS}
            expected = model.generate(encoder_outputs=type(encoded)(**encoded), **kwargs)
            with ours(model):
                got = model.generate(encoder_outputs=type(encoded)(**encoded), **kwargs)
            assert torch.equal(got, expected), (name, beams)


def test_a_generation_config_and_positional_inputs(encoder_decoders: dict[str, Any], inputs: Inputs) -> None:
    model = encoder_decoders["t5"]
    ids = inputs(model, 1)["input_ids"]
    config = transformers.GenerationConfig(
        num_beams=3, max_length=15, length_penalty=0.5, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0
    )
    expected = model.generate(ids, config)
    with ours(model):
        assert torch.equal(model.generate(ids, config), expected)


def test_a_processor_of_the_callers(encoder_decoders: dict[str, Any], inputs: Inputs) -> None:
    class Odd(generation.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.index_fill(1, input_ids[0, -1:] // 2, 9.0)

    model = encoder_decoders["bart"]
    processors = generation.LogitsProcessorList([Odd()])
    for beams in (1, 2):
        expected, got = both(model, **inputs(model, 2), logits_processor=processors, num_beams=beams)
        assert torch.equal(got, expected)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills with NaN what a cache holds from the generation before."""
    take = static_cache.Pool.take

    def poisoned(self: static_cache.Pool, *args: Any, **kwargs: Any) -> static_cache.DecodeCache:
        cache = take(self, *args, **kwargs)
        for layer in [*cache.own, *cache.cross]:
            layer.keys.fill_(torch.nan)
            layer.values.fill_(torch.nan)
        return cache

    monkeypatch.setattr(static_cache.Pool, "take", poisoned)


CALLS = [
    (3, 1, 9),
    (1, 3, 14),
    (3, 1, 14),
    (1, 3, 5),
]  # sentences, beams, tokens: the first and the third share buffers


@pytest.mark.usefixtures("poison")
def test_what_buffers_held_before_is_never_read(model: Any, inputs: Inputs) -> None:
    kwargs = [{**inputs(model, batch), "num_beams": beams, "max_new_tokens": n} for batch, beams, n in CALLS]
    expected = [model.generate(**each) for each in kwargs]
    with ours(model):
        for each, text in zip(kwargs * 2, expected * 2, strict=True):
            assert torch.equal(model.generate(**each), text)


@pytest.mark.usefixtures("poison")
def test_steps_that_could_be_captured(model: Any, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the whole length of their buffers, the position on the device; again from the same buffers and step."""
    monkeypatch.setattr(fused, "captures", names.can_be_fixed)
    kwargs = [{**inputs(model, batch), "num_beams": beams, "max_new_tokens": n} for batch, beams, n in CALLS]
    kwargs.append({**kwargs[1], "return_dict_in_generate": model.config.model_type != "whisper"})
    expected = [model.generate(**each) for each in kwargs]
    with ours(model):
        for each, text in zip(kwargs * 2, expected * 2, strict=True):
            got = model.generate(**each)
            if isinstance(text, torch.Tensor):
                assert torch.equal(got, text)
            else:
                assert torch.equal(got["sequences"], text["sequences"])
                for a, b in zip(held(got), held(text), strict=True):
                    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_nothing_is_captured_to_compare_a_step_with(
    encoder_decoders: dict[str, Any], inputs: Inputs, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None
) -> None:
    """The model's own code says what a step should give: a capture takes seconds, and this is one call."""
    monkeypatch.setattr(fused, "captures", names.can_be_fixed)
    model = copy.deepcopy(encoder_decoders["t5"])
    kwargs = {**inputs(model, 2), "max_new_tokens": 6}
    expected = model.generate(**kwargs)
    paceline.optimize(model, dtype=dtype)
    found = model.generate(**kwargs)
    assert dtype is not None or torch.equal(found, expected)
    told = paceline.fusion.report(model)
    assert len(told.graphs) == 3  # the encoder, the prompt, a step over fixed buffers
    assert "the model's own" not in str(told)


def test_shared_keys_that_a_model_does_not_take_are_not_used(
    model: Any, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.fusion.generate.decoder.SharedKeys", nullcontext)
    kwargs = {**inputs(model, 2), "num_beams": 2, "max_new_tokens": 8}
    expected = model.generate(**kwargs)
    notes: list[str] = []
    with ours(model, note=notes.append):
        for _ in range(2):
            assert torch.equal(model.generate(**kwargs), expected)
    assert len(notes) == (names.attention_of(model) == "sdpa")


def test_a_step_over_fixed_buffers_that_computes_something_else_is_not_used(
    model: Any, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = FixedStep._forward
    monkeypatch.setattr(FixedStep, "_forward", lambda self: forward(self).roll(1, dims=1))
    monkeypatch.setattr(fused, "captures", names.can_be_fixed)
    kwargs = {**inputs(model, 2), "num_beams": 2, "max_new_tokens": 8}
    expected = model.generate(**kwargs)
    notes: list[str] = []
    with ours(model, note=notes.append):
        for _ in range(2):
            assert torch.equal(model.generate(**kwargs), expected)
    assert len(notes) == names.can_be_fixed(model)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_step_past_the_end_leaves_no_trace(
    encoder_decoders: dict[str, Any], inputs: Inputs, monkeypatch: pytest.MonkeyPatch, beams: int
) -> None:
    """As a GPU does one, whose host hears of the end a step late."""
    model = encoder_decoders["t5"]
    prepared = fused.request_of
    monkeypatch.setattr(fused, "request_of", lambda *args: dataclasses.replace(prepared(*args), may_run_on=True))
    arguments = {**inputs(model, 3), "num_beams": beams, "early_stopping": beams > 1, "repetition_penalty": 1.2}
    arguments["eos_token_id"] = ends_seen(model, arguments)
    for tokens in range(1, TOKENS):
        expected, got = both(model, **arguments, max_new_tokens=tokens)
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("optimised", [False, True])
def test_captured_steps(model: Any, inputs: Inputs, optimised: bool) -> None:
    """The texts of transformers on the same GPU, also from steps captured before, with other sentences."""
    model = copy.deepcopy(model).cuda()
    kwargs = [{**inputs(model, batch), "num_beams": beams, "max_new_tokens": n} for batch, beams, n in CALLS]
    kwargs = [{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in each.items()} for each in kwargs]
    expected = [model.generate(**each) for each in kwargs]
    if optimised:
        paceline.optimize(model)
        for each, text in zip(kwargs * 2, expected * 2, strict=True):
            assert torch.equal(model.generate(**each), text)
        assert not paceline.fusion.report(model).eager
        return
    with ours(model):
        for each, text in zip(kwargs * 2, expected * 2, strict=True):
            assert torch.equal(model.generate(**each), text)
        assert all(cache.step[1].graph is not None for cache in model.generate._pool.free)
        (steps,) = model.generate.beam_steps.values()
        assert steps.counts.replayed > steps.counts.eager
        assert not steps.failures
        steps.check_invariants()


def test_with_and_without_inference_mode(encoder_decoders: dict[str, Any], inputs: Inputs) -> None:
    model = encoder_decoders["bart"]
    kwargs = {**inputs(model, 2), "num_beams": 2, "max_new_tokens": 5}
    expected = model.generate(**kwargs)
    with ours(model):
        with torch.inference_mode():
            assert torch.equal(model.generate(**kwargs), expected)
        for _ in range(2):
            assert torch.equal(model.generate(**kwargs), expected)
        with torch.inference_mode():
            assert torch.equal(model.generate(**kwargs), expected)


def test_threads_have_buffers_of_their_own(encoder_decoders: dict[str, Any], inputs: Inputs) -> None:
    model = encoder_decoders["t5"]
    kwargs = [{**inputs(model, batch), "num_beams": 4 - batch, "max_new_tokens": 20} for batch in (1, 3, 1, 3)]
    expected = [model.generate(**each) for each in kwargs]
    texts: dict[int, torch.Tensor] = {}
    with ours(model):
        for each in kwargs[:2]:
            model.generate(**each)  # now there are buffers to be taken
        threads = [
            threading.Thread(target=lambda i=i, each=each: texts.update({i: model.generate(**each)}))
            for i, each in enumerate(kwargs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, text in enumerate(expected):
        assert torch.equal(texts[i], text)


class Streamer(generation.BaseStreamer):
    def put(self, value: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        pass


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"streamer": Streamer()}, "generate: streamer is given"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "generate: output_hidden_states"),
        ({"use_cache": False}, "generate: use_cache is off"),
        ({"cache_implementation": "static"}, "generate: cache_implementation='static'"),
        ({"stopping_criteria": [generation.MaxTimeCriteria(60.0)]}, "generate: stopping criteria MaxTimeCriteria"),
        ({"max_time": 60.0, "num_beams": 2}, "generate: stopping criteria MaxTimeCriteria"),
        ({"stopping_criteria": [generation.MaxLengthCriteria(5)]}, "generate: stopping criteria MaxLengthCriteria"),
        ({"prompt_lookup_num_tokens": 2}, "generate: assisted_generation"),
        ({"decoder_attention_mask": torch.tensor([[0]])}, "generate: decoder_attention_mask masks positions"),
    ],
)
def test_what_is_not_ours_goes_to_transformers(
    encoder_decoders: dict[str, Any], inputs: Inputs, options: dict[str, Any], reason: str
) -> None:
    model = encoder_decoders["bart"]
    if "stopping_criteria" in options:
        options = {"stopping_criteria": generation.StoppingCriteriaList(options["stopping_criteria"])}
    kwargs = {**inputs(model, 1), **options, "max_new_tokens": TOKENS}
    expected = model.generate(**kwargs)
    reasons: list[str] = []
    with ours(model, reasons.append):
        got = model.generate(**kwargs)
    tokens = [each if isinstance(each, torch.Tensor) else each.sequences for each in (got, expected)]
    assert torch.equal(*tokens)
    assert reasons == [reason]


def test_training_mode_and_changed_loops_go_to_transformers(encoder_decoders: dict[str, Any], inputs: Inputs) -> None:
    class Own(transformers.BartForConditionalGeneration):
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
            return super().prepare_inputs_for_generation(*args, **kwargs)

    class Whole(transformers.BartForConditionalGeneration):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return super().generate(*args, **kwargs)

    reasons: list[str] = []
    model = encoder_decoders["bart"]
    arguments = {**inputs(model, 1), "max_new_tokens": 2}
    for kind in (Own, Whole):
        changed = kind(model.config).eval()
        with ours(changed, reasons.append):
            changed.generate(**arguments)
    with ours(model, reasons.append):
        model.train().generate(**arguments)
        model.eval()
    assert reasons == [
        "generate: Own has a prepare_inputs_for_generation of its own",
        "generate: Whole has a generate of its own",
        "generate: the model is in training mode",
    ]


def test_errors_are_those_of_transformers(encoder_decoders: dict[str, Any], inputs: Inputs) -> None:
    model = encoder_decoders["t5"]
    with ours(model), pytest.raises(ValueError, match="no_such_argument"):
        model.generate(**inputs(model, 1), no_such_argument=1)


def test_signature_stays(encoder_decoders: dict[str, Any]) -> None:
    model = encoder_decoders["t5"]
    signature = inspect.signature(model.generate)
    with ours(model):
        assert inspect.signature(model.generate) == signature


def _decoders() -> list[Any]:
    common = {"vocab_size": 60, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0}
    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=False, **common)
    llama = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **common,
    )
    return [transformers.GPT2LMHeadModel(gpt2), transformers.LlamaForCausalLM(llama)]


@pytest.mark.skipif(names.OLD_POSITIONS, reason="not ours before transformers 5")
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}])
def test_models_without_an_encoder(index: int, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    model = _decoders()[index].eval()
    ids = torch.randint(3, 60, (3, 6))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    mask[2, :4] = 0
    expected, got = both(model, ids.masked_fill(mask == 0, 1), attention_mask=mask, **options)
    assert torch.equal(got, expected)
