"""Which decodes run as CUDA graphs, and what is said where none do. The graphs: tests/oracle/test_graphs_gpu.py."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from paceline import LLM
from paceline.config import KVGroup
from paceline.engine.decode_step import Decodes
from paceline.engine.graphs import Graphs, graph_refusal, graph_rows
from paceline.engine.prompt_step import Form


def test_sizes_of_graphs():
    sizes = [graph_rows(count) for count in range(1, 40)]
    assert all(size >= count for count, size in enumerate(sizes, start=1))
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16, 24, 32, 40]


def test_why_there_are_none(tiny_directory):
    with LLM(str(tiny_directory), dtype="float32", num_blocks=8) as llm:
        model = llm.model.engine.runner.model
    assert graph_refusal(model) == "the device is cpu"
    assert graph_refusal(model, mode="eager") == "mode is 'eager'"
    group = KVGroup("full", (0,), None, 2, 512)
    foreign = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, kv_groups=(group,), modules=list)
    assert graph_refusal(foreign) == "transformers' modules run the model"


def test_what_cannot_be_captured_is_computed_and_said_once(monkeypatch, caplog):
    def no_memory(self, compute):
        raise torch.OutOfMemoryError("CUDA out of memory\nand much more")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(Graphs, "_record", no_memory)
    graphs, computed = Graphs(torch.device("cpu")), []
    for key in (Decodes(8, "greedy"), Form(8, 64)) * 2:
        graphs.run(key, lambda key=key: computed.append(key))
    assert computed == [Decodes(8, "greedy"), Form(8, 64)] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "decodes of 8 rows (greedy) run without a CUDA graph: CUDA out of memory",
        "steps of 8 decodes and 64 tokens of prompts run without a CUDA graph: CUDA out of memory",
    ]


@pytest.mark.parametrize(("mode", "level"), [("auto", logging.INFO), ("graph", logging.WARNING)])
def test_the_reason_is_said_once(tiny_directory, caplog, mode, level):
    with caplog.at_level(logging.INFO), LLM(str(tiny_directory), num_blocks=8, mode=mode) as llm:
        assert llm.model.engine.config.async_depth == 0
    said = [record for record in caplog.records if "without CUDA graphs: the device is cpu" in record.getMessage()]
    assert [record.levelno for record in said] == [level]
