"""The text side of a model that is served."""

from __future__ import annotations

import json
import shutil

import pytest

from paceline.errors import ModelNotFoundError
from paceline.serve.text import TextOptions


def test_end_tokens_are_the_models_and_the_tokenizer_may_be_anothers(tiny_chat_model, tmp_path):
    shutil.copytree(tiny_chat_model, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    own = TextOptions(str(tmp_path / "model")).load()
    assert own.eos_token_ids == {2, 7}
    (tmp_path / "model" / "tokenizer.json").unlink()
    other = TextOptions(str(tmp_path / "model"), tokenizer=str(tiny_chat_model), chat_template="{{ 1 }}").load()
    assert other.eos_token_ids == {2, 7}
    assert other.encode("abc") == own.encode("abc")
    assert other.chat_template == "{{ 1 }}"


def test_of_random_weights_nothing_is_fetched(tiny_chat_model):
    where = {"model": "/no/such/model", "tokenizer": str(tiny_chat_model)}
    assert TextOptions(**where, load_format="dummy").load().eos_token_ids == {2}
    with pytest.raises(ModelNotFoundError):
        TextOptions(**where).load()
