"""The shapes are those of the published configs, whose copies the tests of families read too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.benchmark.shapes import SHAPES, read_shape
from paceline.errors import CheckpointError, UsageError
from paceline.models.registry import read_decoder_config

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
PUBLISHED = {"llama-2-7b": "llama-2-7b-hf", "mixtral-8x7b": "mixtral-8x7b-v0.1"}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_shape_is_the_published_config(name):
    file = CONFIGS / f"{PUBLISHED.get(name, name)}.json"
    published = json.loads(file.read_text())
    assert read_decoder_config(read_shape(name)) == read_decoder_config(published)
    assert read_shape(name)["torch_dtype"] == published["torch_dtype"]
    assert read_shape(name)["model_type"] == published["model_type"]


def test_files_and_directories(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"hidden_size": 7}')
    assert read_shape(str(path)) == read_shape(str(tmp_path)) == {"hidden_size": 7}


def test_what_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"unknown shape 'llama-3\.1-8' ?; did you mean 'llama-3\.1-8b'"):
        read_shape("llama-3.1-8")
    with pytest.raises(UsageError, match="no such file"):
        read_shape(str(tmp_path / "missing.json"))
    for text, says in [("{", "is not valid JSON"), ("[]", "holds no JSON object")]:
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(CheckpointError, match=says):
            read_shape(str(tmp_path / "bad.json"))
