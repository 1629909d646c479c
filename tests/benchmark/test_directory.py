from __future__ import annotations

import pytest
import torch

from paceline.benchmark import directory
from paceline.llm import LLM
from paceline.loading.random_checkpoint import RandomCheckpoint
from paceline.loading.safetensors_checkpoint import SafetensorsCheckpoint


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_is_read_as_the_random_model_that_was_written(tiny_config, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(directory, "SHARD_BYTES", 50_000)
    config = {**tiny_config, "vocab_size": 300, "torch_dtype": dtype}
    nbytes = directory.write_directory(config, tmp_path)
    made = RandomCheckpoint(config, dtype=getattr(torch, dtype))
    with SafetensorsCheckpoint(tmp_path) as stored:
        assert nbytes == stored.nbytes
        assert set(stored.names()) == set(made.names())
        for name in made.names():
            assert torch.equal(stored.read(name), made.read(name))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with LLM(str(tmp_path), device="cpu") as llm:
        (answer,) = llm.generate("Two words", {"max_tokens": 3, "temperature": 0.0, "ignore_eos": True})
    assert len(answer.outputs[0].token_ids) == 3


@pytest.mark.parametrize("size", [256, 5000, 70_000])
def test_the_tokenizer_has_the_whole_vocabulary(size):
    tokenizer = directory.random_tokenizer(size)
    assert tokenizer.get_vocab_size() == size
    text = "Größe: 5 µm"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
