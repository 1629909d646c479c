"""Plain decodes on buffers that never move, the host a step behind: the tokens are those of steps built anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.config import CacheConfig, DecoderConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from paceline.engine.decode_step import DecodeStep
from paceline.engine.engine import Engine, EngineRequest
from paceline.engine.graphs import graph_rows
from paceline.engine.model_runner import ModelRunner
from paceline.engine.prompt_step import PromptStep
from paceline.engine.step import RequestUpdate
from paceline.loading.random_checkpoint import RandomCheckpoint
from paceline.models.decoder import Decoder
from paceline.models.load import load_decoder
from paceline.models.registry import read_decoder_config
from paceline.sampling.params import SamplingParams
from paceline.sampling.sampler import NOT_FINITE

VOCAB, BLOCK, MAX_LEN, ROWS = 60, 4, 64, 6
ROOMY, TIGHT = 120, 17  # blocks; TIGHT holds one context and little more

CONFIG = {
    "model_type": "gemma2",  # both kinds of groups: full and window; soft caps
    "architectures": ["Gemma2ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": 128,
    "sliding_window": 6,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 8.0,
}


@cache
def decoder() -> Decoder:
    config: DecoderConfig = read_decoder_config(CONFIG)
    checkpoint = RandomCheckpoint(CONFIG, dtype=torch.float32, device="cpu", seed=5)
    return load_decoder(checkpoint, config, dtype=torch.float32)


def make_engine(model: Any, *, static: bool, depth: int = 0, blocks: int = ROOMY, **options: Any) -> Engine:
    config = EngineConfig(
        max_model_len=MAX_LEN,
        cache=CacheConfig(BLOCK, blocks),
        scheduler=SchedulerConfig(ROWS, 32),
        async_depth=depth,
        **options,
    )

    def decode(kv: Any) -> DecodeStep:
        sizes: dict[str, Any] = {"max_model_len": MAX_LEN, "hidden_size": CONFIG["hidden_size"], "max_decodes": ROWS}
        prompts = PromptStep(model, kv, BLOCK, **sizes, exact=True, uncaptured=0)
        return DecodeStep(model, kv, BLOCK, max_rows=ROWS, max_model_len=MAX_LEN, prompts=prompts)

    counts = (blocks,) * len(model.kv_groups)
    return Engine(config, model.kv_groups, counts, ModelRunner(model, counts, BLOCK, decode if static else None))


class Answers:
    """What an engine said of each request."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, Any] = {}
        self.errors: dict[str, str | None] = {}

    def step(self) -> list[RequestUpdate]:
        updates = self.engine.step()
        for update in updates:
            self.tokens.setdefault(update.request_id, []).extend(update.new_token_ids)
            if update.finish_reason is not None:
                self.reasons[update.request_id] = update.finish_reason
                self.errors[update.request_id] = update.error
        self.engine.scheduler.check_invariants()
        return updates

    def finish(self) -> Answers:
        while self.engine.has_work:
            self.step()
        return self


def asked_of(kind: int, prompt: int, length: int) -> dict[str, Any]:
    asked = {"seed": prompt, "max_tokens": length, **KINDS[kind]}
    return {**asked, "min_tokens": min(length, asked.get("min_tokens", 0))}


def ask(engine: Engine, name: str, prompt: Sequence[int], **params: Any) -> None:
    eos = frozenset(params.pop("eos", ()))
    engine.add_request(EngineRequest(name, tuple(prompt), SamplingParams(**params), eos_token_ids=eos))


# What a request may ask: plain decodes of each kind, and what takes the other path.
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 7, "top_p": 0.9},
    {"temperature": 1.2, "min_p": 0.05, "n": 3},
    {"temperature": 0, "eos": (43, 47)},
    {"temperature": 0.9, "stop_token_ids": [8, 9, 10, 11, 12], "min_tokens": 4},
    {"temperature": 0, "logprobs": 1},
    {"temperature": 0.8, "repetition_penalty": 1.5},
    {"temperature": 0, "n": 2, "use_beam_search": True},
    {"temperature": 1.0, "prompt_logprobs": 0, "max_tokens": 1},
]
PROMPTS = [(1,), (2, 3), (4, 5, 6, 7, 8, 9, 10, 11, 12), (4, 5, 6, 7, 8, 9, 10, 30), tuple(range(13, 38)), (50,) * 15]


@cache
def alone(kind: int, prompt: int, length: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """What steps built anew give the request with no other beside it."""
    answers = Answers(make_engine(decoder(), static=False))
    ask(answers.engine, "x", PROMPTS[prompt], **asked_of(kind, prompt, length))
    answers.finish()
    return {name[1:]: (tuple(tokens), answers.reasons[name]) for name, tokens in answers.tokens.items()}


arrivals = st.lists(
    st.tuples(
        st.integers(0, 6),  # steps before it
        st.integers(0, len(KINDS) - 1),
        st.integers(0, len(PROMPTS) - 1),
        st.sampled_from([1, 2, 5, 12, 20]),  # max_tokens
        st.one_of(st.none(), st.none(), st.integers(1, 9)),  # steps until it is aborted
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(arrivals=arrivals, depth=st.integers(0, 2), blocks=st.sampled_from([ROOMY, TIGHT]))
def test_requests_that_come_and_go_get_what_they_get_alone(arrivals: Any, depth: int, blocks: int) -> None:
    answers = Answers(make_engine(decoder(), static=True, depth=depth, blocks=blocks))
    aborts: dict[int, list[str]] = {}
    step, expected = 0, {}
    for index, (wait, kind, prompt, length, abort) in enumerate(arrivals):
        for _ in range(wait):
            for name in aborts.pop(step, []):
                answers.engine.abort(name)
            answers.step()
            step += 1
        asked = asked_of(kind, prompt, length)
        ask(answers.engine, f"r{index}", PROMPTS[prompt], **asked)
        expected |= {f"r{index}{child}": one for child, one in alone(kind, prompt, length).items()}
        if abort is not None:
            names = [f"r{index}"] if "n" not in asked else [f"r{index}#{i}" for i in range(asked["n"])]
            aborts.setdefault(step + abort, []).extend([f"r{index}", *names])
    while answers.engine.has_work:
        for name in aborts.pop(step, []):
            answers.engine.abort(name)
        answers.step()
        step += 1
    for name, (tokens, reason) in expected.items():
        found = tuple(answers.tokens.get(name, ()))
        if name in answers.reasons:
            assert (found, answers.reasons[name]) == (tokens, reason), name
        else:
            assert found == tokens[: len(found)], name  # aborted
    assert answers.engine.scheduler.cache.stats.used_blocks == (0, 0)


class Spy:
    """A runner's launches and collections, in order, as ("launch" or "collect", requests of a plain decode)."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, int]] = []
        runner = engine.runner
        launch, collect = runner.launch, runner.collect

        def spy_launch(output: Any) -> Any:
            launched = launch(output)
            if not launched.done:
                self.seen.append(("launch", len(output.scheduled)))
            return launched

        def spy_collect(launched: Any) -> Any:
            if not launched.done:
                self.seen.append(("collect", len(launched.request_ids)))
            return collect(launched)

        monkeypatch.setattr(runner, "launch", spy_launch)
        monkeypatch.setattr(runner, "collect", spy_collect)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_steps_are_launched_ahead_of_what_is_collected(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(decoder(), static=True, depth=depth)
    spy = Spy(engine, monkeypatch)
    ask(engine, "a", PROMPTS[2], temperature=0, max_tokens=6)
    Answers(engine).finish()
    launches, collections = [("launch", 1)], [("collect", 1)]  # the prompt's, too
    assert spy.seen == launches * depth + (launches + collections) * (6 - depth) + collections * depth


def test_what_is_no_plain_decode_waits_for_what_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(decoder(), static=True, depth=1)
    spy = Spy(engine, monkeypatch)
    answers = Answers(engine)
    ask(engine, "a", PROMPTS[2], temperature=0, max_tokens=12)
    for _ in range(4):
        answers.step()
    plain = len(spy.seen)
    assert plain == 4 + 3
    ask(engine, "b", PROMPTS[3], temperature=0, max_tokens=3, repetition_penalty=1.3)
    answers.step()
    answers.step()
    assert len(spy.seen) == plain  # beside b, a's decodes are built anew
    answers.finish()
    assert len(spy.seen) > plain
    assert {name: (tuple(tokens), "length") for name, tokens in answers.tokens.items()}["a"] == alone(0, 2, 12)[""]


def test_prompts_and_decodes_beside_them_are_launched_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode's token that the host has not seen goes from one step to the next on the device."""
    engine = make_engine(decoder(), static=True, depth=1)
    spy = Spy(engine, monkeypatch)
    answers = Answers(engine)
    mixed: list[list[str]] = []
    inputs = engine.runner._inputs

    def spy_inputs(scheduled: Any) -> Any:
        made, unknown = inputs(scheduled)
        mixed.append([state.new.request_id for _, state in unknown])
        return made, unknown

    monkeypatch.setattr(engine.runner, "_inputs", spy_inputs)
    for name, prompt in (("a", 2), ("b", 4), ("c", 5)):  # 9, 25 and 15 tokens, 32 a step
        ask(engine, name, PROMPTS[prompt], temperature=1.0, seed=prompt, max_tokens=5)
        answers.step()
    answers.finish()
    assert mixed == [[], ["a"], ["a", "b"]]
    assert [one for one, _ in spy.seen[:6]] == ["launch", "launch", "collect", "launch", "collect", "launch"]
    assert {name: tuple(tokens) for name, tokens in answers.tokens.items()} == {
        name: alone(1, prompt, 5)[""][0] for name, prompt in (("a", 2), ("b", 4), ("c", 5))
    }


def test_preempted_requests_are_computed_again() -> None:
    engine = make_engine(decoder(), static=True, depth=1, blocks=TIGHT)
    for index, prompt in enumerate(PROMPTS):
        ask(engine, str(index), prompt, temperature=0.7, top_k=7, top_p=0.9, seed=index, max_tokens=20)
    answers = Answers(engine).finish()
    assert engine.scheduler.stats.num_preemptions > 0
    for index in range(len(PROMPTS)):
        assert tuple(answers.tokens[str(index)]) == alone(2, index, 20)[""][0]


def test_speculation_goes_on_beside_it() -> None:
    engine = make_engine(decoder(), static=True, speculative=SpeculativeConfig())
    for index, prompt in enumerate(PROMPTS):
        ask(engine, str(index), prompt, temperature=0, max_tokens=20)
    answers = Answers(engine).finish()
    for index in range(len(PROMPTS)):
        assert tuple(answers.tokens[str(index)]) == alone(0, index, 20)[""][0]


class Altered:
    """The decoder, but for what `alter(inputs, hidden_TD)` does after each forward."""

    def __init__(self, alter: Callable[[Any, torch.Tensor], None]) -> None:
        model = decoder()
        self.dtype, self.device, self.vocab_size, self.kv_groups = (
            model.dtype,
            model.device,
            model.vocab_size,
            model.kv_groups,
        )
        self.alter, self.logits = alter, model.logits

    def __call__(self, inputs: Any, kv: Any) -> torch.Tensor:
        hidden_TD = decoder()(inputs, kv)
        self.alter(inputs, hidden_TD)
        return hidden_TD


def broken_from(token: int) -> Callable[[Any, torch.Tensor], None]:
    """NaN where the token's row is computed, and where the first or the last token's is, which are what NaN chooses."""
    broken = torch.tensor([token, 0, VOCAB - 1])

    def break_it(inputs: Any, hidden_TD: torch.Tensor) -> None:
        hidden_TD[torch.isin(inputs.token_ids_T, broken)] = torch.nan

    return break_it


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_request_that_is_not_finite_fails_alone(depth: int, kind: int, caplog: pytest.LogCaptureFixture) -> None:
    """Of three requests the one that goes on from a token of its own breaks; what it has in flight is dropped."""
    expected = {str(p): alone(kind, p, 12)[""][0] for p in (2, 3, 5)}
    tokens, others = expected["3"], {*expected["2"], *expected["5"]}
    poison = next(i for i in range(2, 10) if tokens[i] not in {*others, *tokens[:i]})
    engine = make_engine(Altered(broken_from(tokens[poison])), static=True, depth=depth)
    for p in (2, 3, 5):
        ask(engine, str(p), PROMPTS[p], **asked_of(kind, p, 12))
    answers = Answers(engine).finish()
    assert answers.errors == {"2": None, "3": NOT_FINITE, "5": None}
    assert tuple(answers.tokens["3"]) == tokens[: poison + 1]
    assert {p: tuple(answers.tokens[p]) for p in "25"} == {p: expected[p] for p in "25"}
    assert caplog.text.count("request 3 failed") == 1


@pytest.mark.parametrize("steps", range(1, 6))
def test_a_failure_is_told_once_whatever_was_in_flight(steps: int, caplog: pytest.LogCaptureFixture) -> None:
    """The second request's prompt makes the runner look at all that is in flight at once, in some of these."""
    engine = make_engine(Altered(broken_from(alone(0, 3, 12)[""][0][2])), static=True, depth=2)
    answers = Answers(engine)
    ask(engine, "x", PROMPTS[3], temperature=0, max_tokens=12)
    for _ in range(steps):
        answers.step()
    ask(engine, "y", PROMPTS[5], temperature=1.0, seed=5, max_tokens=12)
    answers.finish()
    assert answers.errors == {"x": NOT_FINITE, "y": None}
    assert caplog.text.count("request x failed") == 1
    assert tuple(answers.tokens["y"]) == alone(1, 5, 12)[""][0]


def test_an_id_may_be_used_again_at_once() -> None:
    """The step in flight of the request that failed says nothing of the one that has its name now."""
    engine = make_engine(Altered(broken_from(alone(0, 3, 12)[""][0][3])), static=True, depth=2)
    answers = Answers(engine)
    ask(engine, "x", PROMPTS[3], temperature=0, max_tokens=12)
    ask(engine, "y", PROMPTS[5], temperature=1.0, seed=5, max_tokens=12)
    while "x" not in answers.errors:
        answers.step()
    answers.tokens.pop("x")
    ask(engine, "x", PROMPTS[5], temperature=1.0, seed=5, max_tokens=12)
    answers.finish()
    assert tuple(answers.tokens["x"]) == tuple(answers.tokens["y"]) == alone(1, 5, 12)[""][0]


@pytest.mark.parametrize("name", ["same", "other"])
def test_a_row_taken_over_at_its_very_position(name: str) -> None:
    """The second request's first decode is at the position after the first one's last, in the same row."""
    engine = make_engine(decoder(), static=True, depth=1)
    answers = Answers(engine)
    ask(engine, "same", PROMPTS[3], temperature=1.0, seed=3, max_tokens=8)  # computes positions 8 to 14
    answers.finish()
    answers.tokens.clear()
    ask(engine, name, PROMPTS[5], temperature=1.0, seed=5, max_tokens=12)  # decodes from 15 on
    assert tuple(answers.finish().tokens[name]) == alone(1, 5, 12)[""][0]
    answers.tokens.clear()
    ask(engine, name, (*PROMPTS[5], 1, 2, 3, 4), temperature=1.0, seed=5, max_tokens=8)  # cached but for a block
    again = Answers(make_engine(decoder(), static=False))
    ask(again.engine, name, (*PROMPTS[5], 1, 2, 3, 4), temperature=1.0, seed=5, max_tokens=8)
    assert answers.finish().tokens == again.finish().tokens


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["cuda", "cpu", "cublas"],
)
def test_a_step_that_memory_does_not_hold_fails_its_largest_share(static: bool, error: Exception) -> None:
    def too_large(inputs: Any, hidden_TD: torch.Tensor) -> None:
        if len(hidden_TD) > 20:
            raise error

    engine = make_engine(Altered(too_large), static=static, depth=1)
    answers = Answers(engine)
    ask(engine, "2", PROMPTS[2], temperature=0, max_tokens=12)
    for _ in range(3):
        answers.step()
    ask(engine, "4", PROMPTS[4], temperature=0, max_tokens=12)  # 25 tokens
    ask(engine, "1", PROMPTS[1], temperature=0, max_tokens=12)
    answers.finish()
    assert "out of memory on cpu in a step of 28 tokens, 25 of them this request's: lower" in answers.errors["4"]
    assert tuple(answers.tokens["2"]) == alone(0, 2, 12)[""][0]
    assert tuple(answers.tokens["1"]) == alone(0, 1, 12)[""][0]


def test_another_error_is_not_taken_for_one_of_memory() -> None:
    def broken(inputs: Any, hidden_TD: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine = make_engine(Altered(broken), static=False)
    ask(engine, "0", PROMPTS[0], temperature=0, max_tokens=2)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.step()


def test_a_decode_that_memory_does_not_hold_is_built_anew(caplog: pytest.LogCaptureFixture) -> None:
    """And so is every one as large from then on. One that does not fit even so fails some of its requests."""

    def too_large(inputs: Any, hidden_TD: torch.Tensor) -> None:
        if inputs.attention.lens_R is not None or len(hidden_TD) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = make_engine(Altered(too_large), static=True, depth=1)
    answers = Answers(engine)
    for p in (0, 1, 2):
        ask(engine, str(p), PROMPTS[p], temperature=0, max_tokens=12)
    answers.finish()
    assert [name for name, error in answers.errors.items() if error] == ["0"]
    said = [record.getMessage() for record in caplog.records if "ahead of the host" in record.getMessage()]
    assert said == [f"no memory is left for decodes of {count} requests ahead of the host" for count in (3, 2)]
    for p in (1, 2):
        assert tuple(answers.tokens[str(p)]) == alone(0, p, 12)[""][0]


def test_a_size_that_memory_does_not_hold_leaves_the_next_smaller_one(caplog: pytest.LogCaptureFixture) -> None:
    model = decoder()

    def decode(kv: Any) -> DecodeStep:
        return DecodeStep(model, kv, BLOCK, max_rows=16, max_model_len=MAX_LEN, round_up=graph_rows)

    step = ModelRunner(model, (ROOMY, ROOMY), BLOCK, decode).decode
    assert step is not None
    left = []
    for count in (13, 8, 3, 2, 1):
        step.lower(count)
        left.append(step.max_rows)
    assert left == [8, 4, 2, 1, 0]
    assert "no memory is left for decodes of 13 requests ahead" in caplog.text


def test_a_steady_step_sends_only_what_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens go to the device when rows move, block tables when a block is added: not at every step."""
    engine = make_engine(decoder(), static=True, depth=1)
    decode = engine.runner.decode
    placed = []
    place = decode._place
    monkeypatch.setattr(decode, "_place", lambda states: placed.append(len(states)) or place(states))
    ask(engine, "a", PROMPTS[2], temperature=0, max_tokens=10)
    ask(engine, "b", PROMPTS[3], temperature=0, max_tokens=6)
    answers = Answers(engine)
    tables = []
    while engine.has_work:
        answers.step()
        tables.append(decode._row_tables[0])
    assert placed == [2, 1]  # b ends
    assert len({id(table) for table in tables if table is not None}) < 6


def test_unused_rows_have_no_length_and_no_slot() -> None:
    ran = []
    model = decoder()

    def decode(kv: Any) -> DecodeStep:
        return DecodeStep(
            model,
            kv,
            BLOCK,
            max_rows=8,
            max_model_len=MAX_LEN,
            run=lambda key, compute: ran.append(key),
            round_up=graph_rows,
        )

    engine = make_engine(model, static=True)
    runner = engine.runner = ModelRunner(model, (ROOMY, ROOMY), BLOCK, decode)
    for p in (2, 3, 5):
        ask(engine, str(p), PROMPTS[p], temperature=0.5, top_k=3, max_tokens=4)
    for _ in range(3):
        engine.step()
    fields = runner.decode._fields
    assert set(ran) == {(4, "filtered")}
    assert fields.length_M[:4].tolist() == [10 + 1, 9 + 1, 16 + 1, 0]
    assert fields.position_M[:4].tolist() == [10, 9, 16, 0]
    for slots in fields.slots_GM:
        assert min(slots[:3].tolist()) >= BLOCK
        assert slots[3] == -1
    assert fields.params.greedy_R[3]
    assert fields.params.top_k_R[:4].tolist() == [3, 3, 3, VOCAB]


def test_a_request_keeps_its_row_while_others_go() -> None:
    """The last row moves into the one that is free, and no other: nothing is sent again of those that stay."""
    engine = make_engine(decoder(), static=True)
    decode = engine.runner.decode
    for name, prompt, length in (("a", 2, 12), ("b", 3, 3), ("c", 5, 12), ("d", 0, 12)):
        ask(engine, name, PROMPTS[prompt], seed=1, max_tokens=length, temperature=0.7, top_k=7, top_p=0.9)
    answers = Answers(engine)
    seen: list[list[str]] = []
    while engine.has_work:
        answers.step()
        names = sorted((row, state.new.request_id) for state, row in decode._row_of.items())
        if not seen or [name for _, name in names] != seen[-1]:
            assert [row for row, _ in names] == list(range(len(names)))
            seen.append([name for _, name in names])
    assert seen == [["a", "b", "c"], ["a", "b", "c", "d"], ["a", "d", "c"], ["d"]]


def test_tables_that_grow_are_sent_as_edits_and_hold_what_was_scheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device's tables say of each request is what the scheduler gave, at every step, with windows that pass,
    blocks that are copied, and rows that others had before."""
    engine = make_engine(decoder(), static=True, depth=1)
    decode = engine.runner.decode
    launch, counts = decode.launch, []
    write = decode._write_tables

    def count_edits(staging: Any, scheduled: Any) -> list[int]:
        counts.append(write(staging, scheduled))
        return counts[-1]

    def check(scheduled: Any, states: Any) -> Any:
        pending = launch(scheduled, states)
        for request, row in zip(scheduled, pending.rows_N.tolist(), strict=True):
            for group, table in enumerate(request.block_tables):
                assert tuple(decode._tables_GMB[group, row, : len(table)].tolist()) == table
                slot = table[request.start // BLOCK] * BLOCK + request.start % BLOCK
                assert decode._fields.slots_GM[group, row] == slot
        return pending

    monkeypatch.setattr(decode, "launch", check)
    monkeypatch.setattr(decode, "_write_tables", count_edits)
    for p in (0, 1, 3):
        ask(engine, str(p), PROMPTS[p], temperature=1.0, seed=p, n=2, max_tokens=6 + 4 * p)
    answers = Answers(engine)
    for _ in range(4):
        answers.step()
    ask(engine, "again", PROMPTS[4], temperature=0, max_tokens=12)
    answers.finish()
    assert sum(map(sum, counts)) > 10
    assert set(map(sum, counts)) >= {0}
