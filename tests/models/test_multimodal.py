from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.errors import UnsupportedModelError
from paceline.models.load import load_decoder
from paceline.models.registry import read_decoder_config


@pytest.fixture
def llava(llama_config) -> dict[str, Any]:
    text = {k: v for k, v in llama_config.items() if k not in ("architectures", "tie_word_embeddings")}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 16},
    }


def test_the_text_part_reads_as_the_text_model_alone(llava, llama_config):
    assert read_decoder_config(llava) == read_decoder_config(llama_config)


def test_text_keys_beside_the_visions_read_like_nested_ones():
    flat = json.loads((Path(__file__).parent / "configs" / "qwen2-vl-7b-instruct.json").read_text())
    outer = {"architectures", "model_type", "vision_config"}
    nested = {k: v for k, v in flat.items() if k in outer}
    nested["text_config"] = {k: v for k, v in flat.items() if k not in outer and "token_id" not in k}
    assert read_decoder_config(nested) == read_decoder_config(flat)


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [(None, None, False), (None, True, True), (True, None, True), (False, True, True), (True, False, True)],
)
def test_tied_embeddings_may_be_said_in_either_place(llava, outer, inner, tied):
    if outer is not None:
        llava["tie_word_embeddings"] = outer
    if inner is not None:
        llava["text_config"]["tie_word_embeddings"] = inner
    assert read_decoder_config(llava).tie_embeddings is tied


def test_a_text_model_of_unknown_kind_is_named_with_the_nearest(llava):
    llava["text_config"]["model_type"] = "llama4_text"
    with pytest.raises(UnsupportedModelError, match=r"'text_config': unknown model_type 'llama4_text'"):
        read_decoder_config(llava)


def test_what_the_outer_part_says_of_the_text_is_judged(llava):
    llava["quantization_config"] = {"quant_method": "awq"}
    with pytest.raises(UnsupportedModelError, match="quantization_config"):
        read_decoder_config(llava)


@pytest.mark.parametrize("nested", ["language_model.{}", "model.{}"])
def test_vision_tensors_are_left_unread_and_said_in_one_line(llava, llama_checkpoint, nested, caplog):
    checkpoint = llama_checkpoint()
    text = dict(checkpoint.tensors)
    checkpoint.tensors.clear()
    for name, values in text.items():
        if nested.startswith("language_model"):  # as transformers 4 wrote them
            checkpoint.tensors[nested.format(name)] = values
        else:  # and 5
            checkpoint.tensors[name.replace("model.", "model.language_model.", 1)] = values
    vision = nested.format("vision_tower.encoder.weight") if nested.startswith("model") else "vision_tower.conv.weight"
    checkpoint.tensors[vision] = torch.zeros(3)
    with caplog.at_level(logging.INFO):
        decoder = load_decoder(checkpoint, read_decoder_config(llava), dtype=torch.float32)
    assert torch.equal(decoder.embedding.table_VD, text["model.embed_tokens.weight"])
    assert vision not in checkpoint.reads
    assert [record.message for record in caplog.records if "plain torch" not in record.message] == [
        "text only: 1 tensors, of the part that sees images, are not loaded"
    ]


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_the_copy_of_a_tied_head_is_no_surprise(llava, llama_checkpoint, name, caplog):
    checkpoint = llama_checkpoint()
    checkpoint.tensors[name] = checkpoint.tensors.pop("lm_head.weight")
    with caplog.at_level(logging.WARNING):
        load_decoder(checkpoint, read_decoder_config({**llava, "tie_word_embeddings": True}), dtype=torch.float32)
    assert not caplog.records


@pytest.mark.parametrize(
    ("config_class", "kind", "architecture"),
    [
        ("Gemma3Config", "gemma3_text", "Gemma3ForConditionalGeneration"),
        ("LlavaConfig", "llama", "LlavaForConditionalGeneration"),
        ("LlavaConfig", "mistral", "LlavaForConditionalGeneration"),
        ("LlavaConfig", "qwen2", "LlavaForConditionalGeneration"),
        ("LlavaConfig", "qwen3", "LlavaForConditionalGeneration"),
        ("Qwen2VLConfig", "qwen2_vl_text", "Qwen2VLForConditionalGeneration"),
        ("Qwen2_5_VLConfig", "qwen2_5_vl_text", "Qwen2_5_VLForConditionalGeneration"),
        ("Qwen3VLConfig", "qwen3_vl_text", "Qwen3VLForConditionalGeneration"),
    ],
)
def test_what_a_text_config_leaves_out_is_what_transformers_takes(config_class, kind, architecture, caplog):
    import transformers

    made = getattr(transformers, config_class)(text_config={"model_type": kind})
    full = {**json.loads(made.to_json_string(use_diff=False)), "architectures": [architecture]}
    with caplog.at_level(logging.WARNING, logger="paceline"):
        spelled_out = read_decoder_config(full)
    assert not [record for record in caplog.records if record.name.startswith("paceline")]
    assert read_decoder_config({"architectures": [architecture], "text_config": {"model_type": kind}}) == spelled_out
