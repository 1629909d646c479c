"""A tiny checkpoint with a tokenizer, made by transformers and tokenizers, for what needs text and weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", ".", "Ċ"]


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory, save_tiny_llama: Callable[[Path, int, int], None]) -> Path:
    """A 2-layer Llama of 32 letters: byte-level tokenizer, a chat template, and a generation_config with defaults."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(directory, len(WORDS), 128)
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['content'] }}.{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "</s>"}))
    generation = {"temperature": 0.5, "top_k": 5, "eos_token_id": [2, 29]}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory
