"""Encoders whose positions, sizes or attention differ from BERT's, and a decoder that embeds: batches against
transformers' own module for each text alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from paceline.llm import LLM

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}
MODELS: dict[str, dict[str, Any]] = {
    "roberta": {},  # its position p is row p + 2
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2},  # no token types, other names of sizes
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "modernbert": {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},  # a decoder, whose last token is the text's vector
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_is_what_each_text_is_alone(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(transformers.CONFIG_MAPPING[kind](**SIZES, **MODELS[kind])).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.save_pretrained(tmp_path)
    Tokenizer(models.WordLevel({str(i): i for i in range(40)}, unk_token="3")).save(str(tmp_path / "tokenizer.json"))
    pooling, place = ("lasttoken", -1) if kind == "qwen3" else ("cls_token", 0)
    kinds = {"Transformer": "", "Pooling": "1_Pooling"}
    (tmp_path / "modules.json").write_text(
        json.dumps([{"type": f"sentence_transformers.models.{name}", "path": path} for name, path in kinds.items()])
    )
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    draw = np.random.RandomState(0)
    texts = [draw.randint(5, 39, length).tolist() for length in (3, 30, 7, 7, 1, 15)]
    with torch.inference_mode():
        expected = np.array([model(torch.tensor([text])).last_hidden_state[0, place].numpy() for text in texts])
    with LLM(str(tmp_path), dtype="float32", device="cpu", mode="eager") as llm:
        found = np.array([output.outputs.embedding for output in llm.embed(texts)])
        assert llm.encoder.loaded.encoder.info.max_length == (38 if kind == "roberta" else 40)
    assert np.abs(found - expected).max() < 1e-5
