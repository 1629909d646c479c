from __future__ import annotations

import logging
from typing import Any

import pytest

from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.models.hf_config import HFConfig
from paceline.models.hf_rope import read_max_position, read_rope

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(parameters: dict[str, Any], head_dim: int = 8, **others: Any):
    return read_rope(HFConfig({"rope_parameters": parameters, **others}), head_dim)


def test_the_trained_length_may_stand_in_either_place():
    inside = read({**LONGROPE, "original_max_position_embeddings": 64}, max_position_embeddings=512)
    assert read(LONGROPE, original_max_position_embeddings=64, max_position_embeddings=512) == inside
    assert inside.scaling is not None
    assert inside.scaling.factor == 8  # 512 / 64: the file gives none


def test_su_is_what_longrope_was_called_first():
    assert read({**LONGROPE, "rope_type": None, "type": "su"}) == read(LONGROPE)


def test_a_part_of_each_head_turns_where_the_family_knows_of_one():
    hf = HFConfig({"rope_pct": 0.5, "rope_theta": 100.0})
    assert read_rope(hf, 16, partial_key="rope_pct").dim == 8
    assert read_rope(HFConfig({}), 16, partial_key="rope_pct", default_partial=0.25).dim == 4
    inside = HFConfig({"rope_pct": 0.5, "rope_parameters": {"partial_rotary_factor": 0.75}})
    assert read_rope(inside, 16, partial_key="rope_pct").dim == 12


@pytest.mark.parametrize(
    ("scaling", "written", "longest"),
    [
        (None, 4096, 4096),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 32768, 131072),  # Qwen2.5
        ({"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}, 65536, 65536),  # OLMo 3
        ({"type": "dynamic", "factor": 4.0}, 2048, 8192),
        ({"type": "linear", "factor": 4.0}, 16384, 16384),
        ({**LLAMA3, "original_max_position_embeddings": 8192}, 131072, 131072),
        ({**LONGROPE, "original_max_position_embeddings": 4096}, 131072, 131072),
    ],
)
def test_the_longest_context_is_as_far_as_the_scaling_reaches(scaling, written, longest):
    hf = HFConfig({"max_position_embeddings": written, "rope_scaling": scaling})
    assert read_max_position(hf, read_rope(hf, 8), 1) == longest


def test_without_rotary_embedding_the_longest_context_is_the_written_one():
    assert read_max_position(HFConfig({"max_position_embeddings": 77}), None, 1) == 77


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"rope_type": "linear"}, "no 'factor'"),
        ({"rope_type": "linear", "factor": 0}, "'factor' to 0: expected a number above 0"),
        ({"rope_type": "dynamic", "factor": "4"}, "'factor' to '4'"),
        ({"rope_type": "yarn", "factor": float("nan")}, "'factor' to nan"),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": -1}, "'original_max.*' to -1"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": -32}, "'beta_fast' to -32"),
        ({**LLAMA3, "low_freq_factor": None}, "no 'low_freq_factor'"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "'low_freq_factor' 4.0 is not below its 'high_freq_factor' 4.0"),
        ({**LONGROPE, "short_factor": [1.0] * 3}, "'short_factor' has 3 values for 4 rotated pairs"),
        ({**LONGROPE, "long_factor": [1.0] * 5}, "'long_factor' has 5 values for 4 rotated pairs"),
        ({**LONGROPE, "long_factor": [1.0, "2", 3.0, 4.0]}, "'long_factor' is .*expected a list of numbers"),
        ({**LONGROPE, "long_factor": [1.0, 0.0, 3.0, 4.0]}, "'long_factor' is .*expected a list of numbers"),
        ({**LONGROPE, "long_factor": 2.0}, "'long_factor' is 2.0: expected a list"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 4}, "no 'long_factor'"),
        ({"rope_theta": -1e4}, "'rope_theta' to -10000.0"),
    ],
)
def test_what_is_missing_or_no_number_is_named(parameters, said):
    with pytest.raises(CheckpointError, match=said):
        read(parameters, max_position_embeddings=64)


@pytest.mark.parametrize(("head_dim", "part"), [(8, 0.1), (8, 0.4), (7, 1.0), (8, 1.5)])
def test_an_odd_or_impossible_part_is_refused(head_dim, part):
    with pytest.raises(CheckpointError, match=f"of the {head_dim} dimensions of a head"):
        read_rope(HFConfig({"part": part}), head_dim, partial_key="part")


def test_a_kind_that_is_unknown_is_named_with_the_nearest():
    with pytest.raises(UnsupportedModelError, match="unknown rope_type 'longrop'; did you mean 'longrope'"):
        read({"rope_type": "longrop"})


def test_a_parameter_that_changes_the_result_is_refused_and_an_unknown_one_said(caplog):
    with pytest.raises(UnsupportedModelError, match=r"'llama_4_scaling_beta' to 0\.1"):
        read({"rope_type": "default", "llama_4_scaling_beta": 0.1})
    with caplog.at_level(logging.WARNING):
        read({"rope_type": "default", "mrope_section": [2, 1, 1]})
        assert not caplog.records
        read({"rope_type": "default", "unheard_of": 2})
    assert "unheard_of" in caplog.text
