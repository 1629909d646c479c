"""What an encoder's files say is followed, and refused by name where it is not implemented."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paceline.encoders.description import EncoderFiles, read_encoder, task_of
from paceline.encoders.modules import read_modules
from paceline.errors import CheckpointError, PacelineError, UnsupportedModelError
from paceline.loading.resolve import ModelSource

BERT = {"architectures": ["BertModel"], "model_type": "bert", "max_position_embeddings": 512}


def write(directory: Path, files: dict[str, Any]) -> ModelSource:
    for name, value in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(value))
    return ModelSource("m", "directory", directory)


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (BERT, "embed"),
        ({**BERT, "architectures": ["BertForMaskedLM"]}, "embed"),
        ({**BERT, "architectures": ["BertForSequenceClassification"]}, "classify"),
        ({**BERT, "is_decoder": True}, None),
        ({**BERT, "architectures": ["BertForTokenClassification"]}, None),
        ({**BERT, "architectures": ["BertLMHeadModel"], "is_decoder": True}, None),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, None),
        ({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}, None),
    ],
)
def test_which_models_are_encoders(config: dict[str, Any], task: str | None, tmp_path: Path) -> None:
    source = write(tmp_path, {"config.json": config})
    assert task_of(source) == task
    assert task_of(ModelSource("m", "gguf", tmp_path)) is None
    write(tmp_path, {"modules.json": []})
    assert task_of(source) == "embed"


@pytest.mark.parametrize(
    ("files", "asked", "length"),
    [
        ({}, None, 512),
        ({"sentence_bert_config.json": {"max_seq_length": 256}}, None, 256),
        ({"sentence_bert_config.json": {"max_seq_length": 256}}, 400, 400),
        ({"tokenizer_config.json": {"model_max_length": 128}}, None, 128),
        ({"tokenizer_config.json": {"model_max_length": 10**30}}, None, 512),
        ({"config.json": {**BERT, "model_type": "roberta", "pad_token_id": 1}}, None, 510),
        ({"config.json": {"architectures": ["BertModel"], "model_type": "bert"}}, 64, 64),
    ],
)
def test_how_long_a_text_may_be(files: dict[str, Any], asked: int | None, length: int, tmp_path: Path) -> None:
    source = write(tmp_path, {"config.json": BERT, **files})
    assert read_encoder(source, "embed", asked).max_length == length


def test_a_length_that_is_not_there(tmp_path: Path) -> None:
    source = write(tmp_path, {"config.json": BERT})
    with pytest.raises(UnsupportedModelError, match="max_model_len 513 is more than the 512 positions of BertModel"):
        read_encoder(source, "embed", 513)
    source = write(tmp_path, {"config.json": {"architectures": ["BertModel"], "model_type": "bert"}})
    with pytest.raises(CheckpointError, match="set max_model_len"):
        read_encoder(source, "embed")


def classifier(tmp_path: Path, **config: Any) -> EncoderFiles:
    config = {**BERT, "architectures": ["BertForSequenceClassification"], **config}
    return read_encoder(write(tmp_path, {"config.json": config}), "classify")


def test_a_classifiers_labels_and_activation(tmp_path: Path) -> None:
    def found(**config: Any) -> tuple[Any, str]:
        files = classifier(tmp_path, **config)
        return files.labels, files.activation

    assert found() == (("LABEL_0", "LABEL_1"), "softmax")
    assert found(id2label={"1": "good", "0": "bad"}) == (("bad", "good"), "softmax")
    assert found(id2label={"0": "score"}) == (("score",), "sigmoid")
    identity = "torch.nn.modules.linear.Identity"
    assert found(id2label={"0": "s"}, sentence_transformers={"activation_fn": identity})[1] == "identity"
    assert found(id2label={"0": "s"}, sbert_ce_default_activation_function=identity)[1] == "identity"
    assert found(problem_type="multi_label_classification")[1] == "sigmoid"
    assert found(problem_type="regression")[1] == "identity"
    with pytest.raises(UnsupportedModelError, match=r"torch\.nn\.modules\.activation\.ReLU, which is not implemented"):
        found(sentence_transformers={"activation_fn": "torch.nn.modules.activation.ReLU"})
    with pytest.raises(CheckpointError, match="id2label does not number the classes from 0"):
        found(id2label={"1": "good"})


@pytest.mark.parametrize(
    ("pooling", "found"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean"]}, "mean"),
    ],
)
def test_poolings(pooling: Any, found: str, tmp_path: Path, sentence_files: Callable[..., dict[str, Any]]) -> None:
    write(tmp_path, {**sentence_files(normalize=False), "1_Pooling/config.json": pooling})
    modules = read_modules(tmp_path)
    assert (modules.pooling, modules.dense, modules.normalize) == (found, (), False)


def entry(kind: str, path: str = "") -> dict[str, str]:
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


POOLING = {"1_Pooling/config.json": {"pooling_mode_mean_tokens": True}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1_Pooling/config.json": {"pooling_mode_weightedmean_tokens": True}}, "pooling_mode_weightedmean_tokens is"),
        ({"1_Pooling/config.json": {"pooling_mode_mean_tokens": 1, "pooling_mode_cls_token": 1}}, "and .* not impl"),
        ({"1_Pooling/config.json": {}}, "pooling by nothing"),
        ({"modules.json": [entry("Transformer"), entry("LSTM")]}, r"module sentence_transformers\.models\.LSTM is not"),
        ({"modules.json": [{"type": "my_package.Pooling"}]}, r"module my_package\.Pooling is not implemented"),
        ({"modules.json": [entry("Transformer"), entry("Normalize")]}, "Transformer, Normalize are not a"),
        ({"modules.json": [entry("Transformer", "0_T"), entry("Pooling", "1_Pooling")], **POOLING}, "lies in 0_T"),
        ({"modules.json": {}}, "holds no list of modules"),
    ],
)
def test_modules_that_are_not_implemented(
    files: Any, message: str, tmp_path: Path, sentence_files: Callable[..., dict[str, Any]]
) -> None:
    write(tmp_path, {**sentence_files(), **files})
    with pytest.raises(PacelineError, match=message) as caught:
        read_modules(tmp_path)
    assert "\n" not in str(caught.value)


def test_dense_layers_in_their_order(tmp_path: Path) -> None:
    modules = [
        entry("Transformer"),
        entry("Pooling", "1_Pooling"),
        entry("Dense", "2_Dense"),
        entry("Dense", "3_Dense"),
    ]
    dense = {"in_features": 32, "out_features": 8, "activation_function": "torch.nn.modules.linear.Identity"}
    write(tmp_path, {"modules.json": modules, **POOLING, "2_Dense/config.json": dense, "3_Dense/config.json": dense})
    found = read_modules(tmp_path)
    assert [layer.directory.name for layer in found.dense] == ["2_Dense", "3_Dense"]
    assert found.dense[0].activation == "identity"
    write(tmp_path, {"2_Dense/config.json": {**dense, "activation_function": "torch.nn.modules.activation.GELU"}})
    with pytest.raises(UnsupportedModelError, match=r"activation .*GELU is not implemented"):
        read_modules(tmp_path)
