"""What is left for behind the first requests: every size and kind of step once, and a compiler in a thread."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paceline.engine import warm_up
from paceline.engine.build import load_model
from paceline.engine.engine import Engine, EngineRequest
from paceline.engine.load_options import LoadOptions
from paceline.engine.warm_up import WarmUp
from paceline.phases import Phases
from paceline.sampling.params import SamplingParams
from paceline.sampling.static import KINDS


def load(directory: Path, **options: Any) -> Engine:
    return load_model(LoadOptions(str(directory), device="cpu", dtype="float32", **options), warm=False).engine


def test_every_size_and_kind_is_captured_once_the_smallest_first():
    """What capturing does: tests/oracle/test_graphs_gpu.py."""
    keys = []
    left = WarmUp(Phases(), SimpleNamespace(max_rows=24, prepare=lambda phases, *key: keys.append(key), prompts=None))
    for count in range(6 * len(KINDS)):
        assert not left.over
        assert len(keys) == count
        left.step()
    assert left.over
    left.step()
    assert keys == [(rows, kind) for rows in (1, 2, 4, 8, 16, 24) for kind in KINDS]


def test_steps_with_prompts_are_captured_after_the_decodes():
    keys = []
    prompts = SimpleNamespace(forms=["a", "b"], prepare=lambda phases, form: keys.append(form))
    left = WarmUp(Phases(), SimpleNamespace(max_rows=1, prepare=lambda *key: keys.append("decodes"), prompts=prompts))
    while not left.over:
        left.step()
    assert keys == ["decodes"] * len(KINDS) + ["a", "b"]


def test_without_memory_for_more_it_ends(caplog):
    sizes = []

    def prepare(phases: Phases, rows: int, kind: str) -> None:
        sizes.append(rows)
        if rows == 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    left = WarmUp(Phases(), SimpleNamespace(max_rows=64, prepare=prepare, prompts=None))
    while not left.over:
        left.step()
    assert sizes == [1] * len(KINDS) + [2] * len(KINDS) + [4]
    assert "the larger ones run kernel by kernel" in caplog.text


def test_other_errors_are_not_hidden():
    def prepare(phases: Phases, rows: int, kind: str) -> None:
        raise RuntimeError("a bug")

    left = WarmUp(Phases(), SimpleNamespace(max_rows=1, prepare=prepare, prompts=None))
    with pytest.raises(RuntimeError, match="a bug"):
        left.step()


def test_compiling_keeps_nobody_waiting(tiny_directory, monkeypatch, caplog):
    released, done, seen = threading.Event(), threading.Event(), []

    def compile_model(model: Any, dtype: torch.dtype, device: torch.device) -> str:
        seen.append((model, dtype, device.type))
        assert released.wait(30)
        done.set()
        return "no compiler"

    monkeypatch.setattr(warm_up, "compile_model", compile_model)
    caplog.set_level(logging.WARNING)
    engine, phases = load(tiny_directory, mode="compile"), Phases()
    assert not seen  # loading did not
    left = WarmUp(phases, compiles=engine.runner.model)
    assert left.over  # for the engine's thread there is nothing to do
    engine.add_request(EngineRequest("r", (3, 7), SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    assert not done.is_set()
    assert (phases.current, phases.seconds) == ("compile", {})
    released.set()
    assert done.wait(30)
    for thread in threading.enumerate():
        if thread.name == "paceline-compile":
            thread.join(30)
    assert seen == [(engine.runner.model, torch.float32, "cpu")]
    assert phases.current is None
    assert phases.seconds["compile"] > 0
    assert "torch.compile does not work here: no compiler; the model runs uncompiled" in caplog.text
