"""`paceline.optimize` of a model that generates: encoder and steps run captured graphs, and the texts stay."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import paceline
from paceline.fusion import report, restore

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_texts_of_an_optimised_model(
    encoder_decoders: dict[str, Any], inputs: Callable[[Any, int], dict[str, torch.Tensor]]
) -> None:
    model = copy.deepcopy(encoder_decoders["t5"])
    calls = [
        {**inputs(model, 3), "max_new_tokens": 9},
        {**inputs(model, 3), "num_beams": 3, "max_new_tokens": 9},
    ]
    expected = [model.generate(**call) for call in calls]
    assert paceline.optimize(model) is model
    for call, text in zip(calls, expected, strict=True):
        assert torch.equal(model.generate(**call), text)
    told = report(model)
    captured = len(told.graphs)
    # The encoder; a prompt, the token after it and any later one; both with beams, and once what they are checked by.
    assert captured <= 7
    assert not told.breaks
    assert not told.eager
    assert not [graph.refused for graph in told.graphs if graph.refused]
    for call, text in zip(calls, expected, strict=True):
        assert torch.equal(model.generate(**call), text)
    assert len(told.graphs) == captured, "a generation of known shapes captured again"
    twin = copy.deepcopy(model)
    reason = "generate: the model is in training mode"
    model.train().generate(**calls[0])
    assert reason in told.eager
    assert not report(twin).eager, "a copy has a report of its own"
    twin.train().generate(**calls[0])
    assert reason in report(twin).eager
    for each in (model, twin):
        restore(each)
        for module in (each, each.get_encoder()):
            assert not {"generate", "forward"} & vars(module).keys()


def test_an_optimised_model_is_pickled_with_its_loop(encoder_decoders: dict[str, Any]) -> None:
    model = paceline.optimize(copy.deepcopy(encoder_decoders["marian"]))
    again = pickle.loads(pickle.dumps(model))
    ids = torch.tensor([[5, 6, 2]])
    assert type(again.generate) is type(model.generate)
    # From here on without captures, which would take seconds.
    for each in (model, again):
        for module in (each, each.get_encoder()):
            del vars(module)["forward"]
    assert torch.equal(again.generate(ids, max_new_tokens=5), model.generate(ids, max_new_tokens=5))
    assert again.generate.forward.report is not model.generate.forward.report


def test_a_model_with_a_generate_of_its_own_keeps_it(encoder_decoders: dict[str, Any]) -> None:
    model = copy.deepcopy(encoder_decoders["t5"])
    vars(model)["generate"] = own = lambda **_: "mine"
    paceline.optimize(model)
    assert model.generate is own
    restore(model)
    assert model.generate is own
