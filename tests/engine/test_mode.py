"""`mode`: the same tokens in each, and a compiler that does not work is told."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from paceline import LLM, SamplingParams, UsageError
from paceline.config import MODES

# Of torch's own, when its compiler is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

# Together more rows than are left to plain torch (kernels/elementwise.py), and never as many twice.
PROMPTS = [[random.Random(seed).randrange(3, 29) for _ in range(80 + seed)] for seed in range(4)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def answers(directory: Path, mode: str) -> list[tuple[int, ...]]:
    with LLM(str(directory), device="cpu", dtype="float32", mode=mode) as llm:
        found = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
        return [*found, *(output.outputs[0].token_ids for output in llm.generate(PROMPTS[1:], GREEDY))]


@pytest.fixture(scope="module")
def plain(tiny_directory):
    return answers(tiny_directory, "eager")


def test_an_unknown_mode_names_the_known():
    with pytest.raises(UsageError, match="mode must be one of auto, eager, graph, compile, got 'grahp'"):
        LLM("nowhere", mode="grahp")


# Compiling takes half a minute.
OTHERS = [pytest.param(mode, marks=[pytest.mark.slow] * (mode == "compile")) for mode in MODES if mode != "eager"]


@pytest.mark.parametrize("mode", OTHERS)
def test_every_mode_has_the_same_tokens(mode, tiny_directory, plain):
    assert answers(tiny_directory, mode) == plain


def test_what_compiles_does_so_at_load_and_once_for_every_number_of_rows(tiny_directory):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # what other tests have compiled is not this one's
    calls = {"rms_norm": 0, "gated": 0}
    with LLM(str(tiny_directory), device="cpu", dtype="float32", mode="compile") as llm:
        compiled = counters["stats"]["unique_graphs"]
        assert compiled > 0
        rows = [prompt.size(0) for prompt in _seen(llm, calls)]
        assert counters["stats"]["unique_graphs"] == compiled
    assert max(rows) >= 256 > min(rows)
    assert all(calls.values())


def _seen(llm: LLM, calls: dict[str, int]) -> list[torch.Tensor]:
    """What went through the compiled functions while PROMPTS, two of them and one were answered."""
    import dataclasses

    from paceline.kernels.elementwise import PLAIN
    from paceline.layers.linear import Linear
    from paceline.layers.norm import Norm

    seen: list[torch.Tensor] = []

    def watched(name, function):
        def call(x_TC, *rest):
            calls[name] += 1
            seen.append(x_TC)
            return function(x_TC, *rest)

        return call

    assert PLAIN not in {module.ops for module in llm.model.engine.runner.model.modules() if isinstance(module, Norm)}
    for module in llm.model.engine.runner.model.modules():
        if isinstance(module, (Norm, Linear)):
            found = {name: watched(name, getattr(module.ops, name)) for name in calls}
            module.ops = dataclasses.replace(module.ops, **found)
    for prompts in (PROMPTS, [*PROMPTS[:3], PROMPTS[0][:40]], PROMPTS[:1]):
        llm.generate(prompts, GREEDY)
    return seen


def test_without_a_compiler_it_runs_and_says_why(tiny_directory, plain, caplog):
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    with config.patch({"cpp.cxx": ("/no/such/compiler",)}), fresh_cache():
        assert answers(tiny_directory, "compile") == plain
    torch._dynamo.reset()
    (line,) = [message for message in caplog.messages if message.startswith("mode='compile'")]
    assert line.startswith("mode='compile': torch.compile does not work here: ")
    assert "/no/such/compiler" in line
    assert line.endswith("; the model runs uncompiled")
