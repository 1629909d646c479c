"""Decodes as CUDA graphs: the tokens of the CPU in float32, and no wait for the device from launch to launch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from paceline import reference
from paceline.config import CacheConfig, SchedulerConfig
from paceline.engine.build import load_model
from paceline.engine.engine import EngineRequest
from paceline.engine.graphs import Graphs
from paceline.engine.load_options import LoadOptions
from paceline.engine.prompt_step import Content, Form
from paceline.engine.step import StepOutput
from paceline.engine.warm_up import WarmUp
from paceline.inputs import ModelInputs
from paceline.llm import LLM
from paceline.phases import Phases
from paceline.sampling.params import SamplingParams
from paceline.sampling.sampler import NOT_FINITE
from paceline.sampling.static import KINDS

pytestmark = pytest.mark.gpu

OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "block_size": 4, "max_num_seqs": 16}
REFERENCE = ["llama-llama3", "llama-mqa", "llama-bias", "qwen2-window", "qwen3", "gemma2", "gemma3"]  # has them
FAMILIES = ["llama-llama3", "llama-bias", "qwen2-window", "qwen3", "gemma2", "gemma3", "gpt2", "bloom-six-heads"]


def prompts(count: int, longest: int = 30) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [{"prompt_token_ids": torch.randint(1, 96, (n,), generator=generator).tolist()} for n in lengths]


def asked(count: int) -> list[SamplingParams]:
    """Answers of different lengths, so that rows move and sizes change; greedy, drawn and filtered rows beside."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.0},
        {"temperature": 1.3, "min_p": 0.05},
    ]
    return [
        SamplingParams(max_tokens=6 + 3 * i, ignore_eos=True, seed=i, **kinds[i % len(kinds)]) for i in range(count)
    ]


def generate(directory: str, params: Sequence[SamplingParams], **options: Any) -> list[tuple[int, ...]]:
    with LLM(directory, **{**OPTIONS, **options}) as llm:
        outputs = llm.generate(prompts(len(params)), params)
        return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_tokens_are_those_of_the_cpu(tiny_model: Callable[[str], Any], name: str):
    directory = str(tiny_model(name).directory)
    params = asked(11)
    expected = generate(directory, params, device="cpu", dtype="float32", num_blocks=256)
    eager = generate(directory, params, device="cuda", dtype="float32", num_blocks=256, mode="eager")
    assert eager == expected
    for depth in (0, 1, 2):
        options = {"device": "cuda", "dtype": "float32", "mode": "graph", "async_depth": depth}
        assert generate(directory, params, num_blocks=256, **options) == expected
        assert generate(directory, params, num_blocks=40, **options) == expected  # preempted now and then


@pytest.mark.parametrize("name", REFERENCE)
def test_64_streams_get_the_references_tokens(tiny_model: Callable[[str], Any], name: str):
    model = tiny_model(name)
    given = prompts(64)
    options: dict[str, Any] = {**OPTIONS, "max_num_seqs": 64, "num_blocks": 700}
    with LLM(str(model.directory), device="cuda", dtype="float32", mode="graph", **options) as llm:
        outputs = llm.generate(given, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    oracle = reference.load(model.checkpoint, model.config)
    for prompt, output in zip(given, outputs, strict=True):
        ids, tokens = prompt["prompt_token_ids"], list(output.outputs[0].token_ids)
        logits = reference.forward(oracle, [*ids, *tokens[:-1]], reference.Cache())[len(ids) - 1 :]
        likelihood = logits.log_softmax(dim=-1)
        chosen = likelihood.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (likelihood.amax(dim=1) - chosen).max() < 2e-4  # the likeliest token, or tied with it


@pytest.mark.parametrize("name", ["llama-llama3", "mixtral", "qwen3-moe"])
def test_bfloat16_tokens_are_those_of_steps_without_graphs(
    tiny_model: Callable[[str], Any], name: str, caplog: pytest.LogCaptureFixture
):
    """One request, so that both have the same shapes; a mixture's experts are found on the device."""
    directory = str(tiny_model(name).directory)
    params = [SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)]
    options = {"device": "cuda", "dtype": "bfloat16", "num_blocks": 64}
    captured = generate(directory, params, mode="graph", **options)
    assert "without CUDA graphs" not in caplog.text
    assert captured == generate(directory, params, mode="eager", **options)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_launches_wait_for_nothing(tiny_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch):
    """Once captured: with prompts, rows that stay or end, and tables that grow, whatever the kind of sampling."""
    directory = str(tiny_model("gemma3").directory)
    with LLM(directory, device="cuda", dtype="float32", mode="graph", **OPTIONS) as llm:
        params = asked(11)
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts(11), params)]
        runner = llm.model.engine.runner
        launch, seen = runner.launch, []

        def watched(output: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                launched = launch(output)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            seen.append(len(output.scheduled))
            return launched

        monkeypatch.setattr(runner, "launch", watched)
        found = [output.outputs[0].token_ids for output in llm.generate(prompts(11), params)]
        assert found == expected
        assert len(seen) > 30
        assert {1, 2, 5, 11} <= set(seen)


def test_one_greedy_stream_finds_its_graph_captured(tiny_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch):
    directory = str(tiny_model("gemma3").directory)
    options = {**OPTIONS, "device": "cuda", "dtype": "float32", "num_blocks": 64}
    params = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)]
    expected = generate(directory, params, **{**options, "mode": "eager"})
    with LLM(directory, **{**options, "mode": "graph"}) as llm:
        assert min(llm.model.phases[name] for name in ("kernels", "graphs")) > 0
        capture = Graphs._capture

        def only_prompts(self: Graphs, key: Any, compute: Callable[[], None]) -> Any:
            assert isinstance(key, Form)
            return capture(self, key, compute)

        monkeypatch.setattr(Graphs, "_capture", only_prompts)
        for _ in range(2):
            assert [output.outputs[0].token_ids for output in llm.generate(prompts(1), params)] == expected


def test_a_request_that_is_not_finite_fails_alone(tiny_model: Callable[[str], Any]):
    """Its embedding is NaN at a token that it alone meets; afterwards its blocks serve others."""
    model = tiny_model("llama")
    options = {**OPTIONS, "device": "cuda", "dtype": "float32", "mode": "graph", "num_blocks": 40}
    options["enable_prefix_caching"] = False
    greedy = [SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)] * 3
    with LLM(str(model.directory), **options) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts(3), greedy)]
        others = {token for i in (0, 2) for token in expected[i]}
        others |= {token for prompt in prompts(3) for token in prompt["prompt_token_ids"]}
        poison = next(token for token in expected[1][1:] if token not in others)
        with torch.inference_mode():
            llm.model.engine.runner.model.embedding.table_VD[poison] = torch.nan
        for _ in range(2):
            broken = llm.generate(prompts(3), greedy)
            assert [output.outputs[0].error for output in broken] == [None, NOT_FINITE, None]
            assert [broken[i].outputs[0].token_ids for i in (0, 2)] == [expected[i] for i in (0, 2)]


def test_steps_that_cannot_be_captured_run_without(
    tiny_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    directory, params = str(tiny_model("llama").directory), asked(3)
    options = {**OPTIONS, "device": "cuda", "dtype": "float32", "num_blocks": 64}
    expected = generate(directory, params, **{**options, "mode": "eager"})

    def no_memory(*_: Any, **__: Any) -> StepOutput:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch.cuda.CUDAGraph.capture_begin", no_memory)
    with caplog.at_level(logging.WARNING):
        assert generate(directory, params, **{**options, "mode": "graph"}) == expected
    assert caplog.text.count("decodes of 1 rows (greedy) run without a CUDA graph") <= 1
    assert "run without a CUDA graph: CUDA out of memory" in caplog.text


@pytest.mark.parametrize("name", ["llama-llama3", "gemma3", "bloom-six-heads"])
def test_a_server_captures_every_size_behind_its_first_request(
    tiny_model: Callable[[str], Any], name: str, monkeypatch: pytest.MonkeyPatch
):
    """The first request runs kernel by kernel; afterwards no step of any size or kind is captured any more."""
    directory = str(tiny_model(name).directory)
    expected = generate(directory, asked(11), device="cpu", dtype="float32", num_blocks=256)
    options = LoadOptions(
        directory,
        device="cuda",
        dtype="float32",
        mode="graph",
        skip_tokenizer_init=True,
        cache=CacheConfig(block_size=4, num_blocks=256),
        scheduler=SchedulerConfig(max_num_seqs=16),
    )
    engine = load_model(options, warm=False).engine

    def answers() -> list[tuple[int, ...]]:
        """Three at once, then one a step, so that prompts come beside none, few and many decodes."""
        waiting = [
            EngineRequest(str(index), prompt["prompt_token_ids"], params)
            for index, (prompt, params) in enumerate(zip(prompts(11), asked(11), strict=True))
        ]
        tokens: dict[str, tuple[int, ...]] = {}
        while waiting or engine.has_work:
            for _ in range(3 if len(waiting) == 11 else 1):
                if waiting:
                    engine.add_request(waiting.pop(0))
            for update in engine.step():
                tokens[update.request_id] = tokens.get(update.request_id, ()) + update.new_token_ids
        return [tokens[str(index)] for index in range(11)]

    decode = engine.runner.decode
    assert decode is not None
    graphs = decode._run.__self__._graphs  # type: ignore[attr-defined]
    assert not graphs
    warm_up = WarmUp(Phases(), decode)
    while not warm_up.over:
        warm_up.step()
    captured = dict(graphs)
    assert decode.prompts is not None
    assert {form.decodes for form in decode.prompts.forms} == {0, 8, 16}
    assert len(captured) == 5 * len(KINDS) + len(decode.prompts.forms)
    assert all(graph is not None for graph in captured.values())
    replayed: list[Form] = []
    run = decode.prompts.run

    def watched(inputs: ModelInputs, content: Content) -> torch.Tensor:
        replayed.append(content.form)
        return run(inputs, content)

    monkeypatch.setattr(decode.prompts, "run", watched)
    assert answers() == expected
    assert graphs == captured
    assert {form.decodes for form in replayed} == {0, 8, 16}
    assert len(replayed) == 9  # every step with a prompt
