"""What can be told of a fallback model without running one: its configuration, its masks, what is missing."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers

from paceline.config import KVGroup
from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.models.fallback import group_calls, read_fallback_config
from paceline.models.fallback_attention import (
    FULL,
    MARK,
    UNKNOWN,
    AttentionCall,
    Port,
    Probing,
    probe_attention,
    read_window,
)
from paceline.models.implementation import choose_config

PHI = {
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi",
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 80,
    "vocab_size": 96,
    "max_position_embeddings": 512,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 3,
    "long_factor": [4.0] * 3,
    "original_max_position_embeddings": 128,
}


def sliding(window: int) -> Any:
    return lambda batch, head, query, key: (key <= query) & (key > query - window)


def test_a_mask_is_read_at_any_length():
    causal = lambda batch, head, query, key: key <= query  # noqa: E731
    assert read_window(causal, None, 100_000) == FULL
    assert read_window(sliding(50_000), 50_000, 100_000) == 50_000
    assert read_window(sliding(6), 6, 100) == 6
    assert read_window(causal, 6, 100) == FULL
    assert read_window(sliding(200), 200, 100) == FULL  # longer than any context


@pytest.mark.parametrize(
    "mask",
    [
        lambda batch, head, query, key: key <= query + 0 * key + 1,
        lambda batch, head, query, key: (key <= query) & (key // 50_000 == query // 50_000),
        lambda batch, head, query, key: key >= 0,
        lambda batch, head, query, key: torch.ones(7, dtype=torch.bool)[key] & (key <= query),
        sliding(50_001),
    ],
    ids=["sees ahead", "in chunks", "all", "of the probe's tokens", "another window"],
)
def test_any_other_mask_is_unknown(mask):
    assert read_window(mask, 50_000, 100_000) == UNKNOWN


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (None, "without a causal mask"),
        (torch.full((1, 1, 3, 3), MARK + UNKNOWN), "neither causal nor a sliding window"),
        (torch.full((1, 1, 3, 3), MARK).index_fill(3, torch.tensor([2]), 9.5), "a mask or a bias of its own"),
        (torch.full((1, 1, 3, 3), MARK + 0.25), "a mask or a bias of its own"),
        (torch.zeros(1, 1, 3, 3, dtype=torch.bool), "a mask or a bias of its own"),
    ],
)
def test_a_probed_call_with_another_mask_is_refused(mask, said):
    module = torch.nn.Identity()
    Port(module).current = Probing()
    heads_1HTD = torch.ones(1, 2, 3, 4)
    probe_attention(module, heads_1HTD, heads_1HTD, heads_1HTD, torch.full((1, 1, 3, 3), MARK + 6))
    assert module.paceline_port.current.calls == [AttentionCall(module, 2, 4, 6)]
    with pytest.raises(UnsupportedModelError, match=said):
        probe_attention(module, heads_1HTD, heads_1HTD, heads_1HTD, mask)


def test_calls_are_grouped_by_window_and_shape():
    module = torch.nn.Identity()
    calls = [AttentionCall(module, 2, 16, window) for window in (6, None, 6)] + [AttentionCall(module, 2, 32, None)]
    assert group_calls(calls) == (
        KVGroup("full", (1,), None, 2, 16),
        KVGroup("full", (3,), None, 2, 32),
        KVGroup("window", (0, 2), 6, 2, 16),
    )


def test_the_configuration_is_transformers_own():
    config = read_fallback_config(PHI)
    assert (config.architecture, config.vocab_size, config.max_position) == ("PhiForCausalLM", 96, 512)
    assert config.model_class is transformers.PhiForCausalLM


def test_a_growing_rotary_embedding_limits_the_context(caplog):
    config = read_fallback_config({**PHI, "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.5}})
    assert config.max_position == 128
    assert "context limited to 128 of 512 tokens" in caplog.text


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UnsupportedModelError, match=r'unknown architecture .*may run PhiForCausalLM.*"paceline\[fallback\]"'
    ):
        choose_config(PHI, "auto")


def test_an_old_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")  # it replaces itself as it loads
    with pytest.raises(UnsupportedModelError, match=r"transformers 4.57.1 is too old .*pip install"):
        read_fallback_config(PHI)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "phy"}, "does not know the model type 'phy' of PhiForCausalLM$"),
        ({"model_type": "phy", "auto_map": {"AutoModel": "x.Y"}}, "runs no code from a checkpoint"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "does not build T5ForCond"),
        ({"architectures": ["PhiForSequenceClassification"]}, "does not build PhiForSequenceClassification"),
        ({"architectures": None}, "does not build"),
    ],
)
def test_what_transformers_does_not_build_is_refused(changes, said):
    with pytest.raises(UnsupportedModelError, match=said):
        read_fallback_config({**PHI, **changes})


def test_a_config_that_transformers_cannot_read_is_named():
    with pytest.raises(CheckpointError, match=r"config\.json: transformers cannot read it"):
        read_fallback_config({**PHI, "hidden_size": "wide"})


def test_no_architecture_at_all_stays_an_incomplete_config():
    with pytest.raises(CheckpointError, match="no 'architectures'"):
        choose_config({**PHI, "architectures": []}, "auto")
