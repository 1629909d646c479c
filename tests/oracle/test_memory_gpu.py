"""Memory that runs out on a CUDA device, while loading or running: told, and the rest goes on."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline import LLM
from paceline.benchmark.shapes import read_shape
from paceline.engine.engine import EngineRequest
from paceline.errors import OutOfMemoryError
from paceline.sampling.params import SamplingParams

pytestmark = pytest.mark.gpu

MIB = 1 << 20
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
OPTIONS = {"load_format": "dummy", "skip_tokenizer_init": True, "device": "cuda", "max_num_seqs": 4}


@pytest.fixture
def shape(tmp_path: Path) -> Callable[[str], str]:
    """The path of a config.json of a shape of benchmark/shapes.py."""

    def write(name: str) -> str:
        (tmp_path / f"{name}.json").write_text(json.dumps(read_shape(name)))
        return str(tmp_path / f"{name}.json")

    return write


@pytest.fixture
def smollm2(shape: Callable[[str], str]) -> str:
    return shape("smollm2-135m")


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """limit(n): torch may have n bytes more than it has now, whatever it kept of earlier tests given back."""

    def set_limit(more: int) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

    yield set_limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_loading_that_runs_out_gives_back_what_it_had(shape: Callable[[str], str], limit: Any):
    """A smaller model then fits the same memory, in the same process."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    limit(600 * MIB)
    with pytest.raises(OutOfMemoryError, match="no memory is left on cuda for '"):
        LLM(shape("llama-3.2-1b"), max_model_len=64, **OPTIONS)
    assert torch.cuda.memory_allocated() == before
    with LLM(shape("smollm2-135m"), max_model_len=64, **OPTIONS) as llm:
        assert len(llm.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids) == 6


def test_a_step_that_runs_out_fails_its_largest_request_and_the_others_go_on(smollm2: str, limit: Any):
    long, short = list(range(2000)), list(range(5))
    with LLM(smollm2, max_model_len=2048, enable_prefix_caching=False, **OPTIONS) as llm:
        engine = llm.model.engine
        expected = [list(llm.generate([prompt], GREEDY)[0].outputs[0].token_ids) for prompt in (short, long)]
        limit(8 * MIB)  # a step of 2,000 tokens takes 33 MB
        for index, prompt in enumerate((short, long, short)):
            engine.add_request(EngineRequest(str(index), prompt, GREEDY))
        found: dict[str, list[int]] = {"0": [], "2": []}
        errors: dict[str, str] = {}
        while engine.has_work:
            for update in engine.step():
                if update.error is not None:
                    errors[update.request_id] = update.error
                else:
                    found[update.request_id] += update.new_token_ids
            engine.scheduler.check_invariants()
        assert list(errors) == ["1"]
        assert "out of memory on cuda in a step of 2010 tokens, 2000 of them this request's" in errors["1"]
        assert found == {"0": expected[0], "2": expected[0]}
        assert engine.scheduler.cache.stats.used_blocks == (0,)
        torch.cuda.set_per_process_memory_fraction(1.0)
        assert list(llm.generate([long], GREEDY)[0].outputs[0].token_ids) == expected[1]


@pytest.mark.parametrize("seqs", [1, 20])
def test_the_pool_of_all_graphs_is_the_planned_one(smollm2: str, seqs: int):
    """Every size and every kind of sampling, from small to large: the order that would need the most."""
    drawn = SamplingParams(temperature=1.0, max_tokens=3, ignore_eos=True, seed=1)
    filtered = SamplingParams(temperature=1.0, top_k=40, top_p=0.9, max_tokens=3, ignore_eos=True, seed=1)
    gc.collect()
    torch.cuda.empty_cache()  # the pools of earlier tests
    before = _pools()
    with LLM(smollm2, max_model_len=64, **{**OPTIONS, "max_num_seqs": seqs}) as llm:
        for params in (GREEDY, drawn, filtered):
            for count in (1, 2, 3, 5, 9, 17):
                if count <= seqs:
                    llm.generate([[7, 8, i] for i in range(count)], params)
        sizes, decode = llm.model.sizes, llm.model.engine.runner.decode
        assert sizes is not None
        assert 0 < _pools() - before <= sizes.graph_pool
        assert decode is not None
        assert decode.nbytes == sizes.buffers(64)


def _pools() -> int:
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0))
