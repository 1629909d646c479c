"""`LLM` of an encoder against transformers' own module: poolings, classes, scores, order, lengths."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from paceline.encoders import load
from paceline.errors import CheckpointError, EngineError, PromptTooLongError, UnsupportedModelError, UsageError
from paceline.fusion import report
from paceline.host import Cpu
from paceline.llm import LLM

TEXTS = ["fox", "a b c d e f g h", "jumps over . fox", "z", "fox fox jump over over a b c d e f g h i j k l m", ""]


def embedded(llm: LLM, texts: Any, **options: Any) -> np.ndarray:
    return np.array([output.outputs.embedding for output in llm.embed(texts, **options)])


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "lasttoken", "max_tokens"])
def test_each_pooling_is_of_transformers_hidden_states(
    pooling: str,
    tmp_path: Path,
    save_tiny_bert: Callable[..., Path],
    sentence_files: Callable[..., Any],
    hidden_states: Callable[..., Any],
) -> None:
    save_tiny_bert(tmp_path, files=sentence_files(f"pooling_mode_{pooling}", normalize=False))
    of = {
        "mean_tokens": lambda hidden: hidden.mean(0),
        "cls_token": lambda hidden: hidden[0],
        "lasttoken": lambda hidden: hidden[-1],
        "max_tokens": lambda hidden: hidden.amax(0),
    }[pooling]
    with LLM(str(tmp_path), dtype="float32", device="cpu", mode="eager") as llm:
        for output in llm.embed(TEXTS):
            expected = of(hidden_states(tmp_path, list(output.prompt_token_ids)))
            assert output.outputs.embedding == pytest.approx(expected.tolist(), abs=2e-5)


def test_order_batches_and_ways_to_give_a_text(embedder: LLM) -> None:
    together = embedded(embedder, TEXTS * 20)
    alone = np.concatenate([embedded(embedder, text) for text in TEXTS])
    assert np.abs(together - np.tile(alone, (20, 1))).max() < 1e-5
    assert np.abs(np.linalg.norm(alone, axis=-1) - 1).max() < 1e-6
    ids = list(embedder.embed("fox")[0].prompt_token_ids)
    assert len(ids) == 3
    for way in (ids, [ids], {"prompt_token_ids": ids}, [{"prompt": "fox"}]):
        assert embedded(embedder, way) == pytest.approx(alone[:1], abs=1e-6)
    assert embedder.embed([]) == []


def test_the_optimised_module_is_transformers_own_but_faster(embedder: LLM, tiny_embedder: Path) -> None:
    with LLM(str(tiny_embedder), dtype="float32", device="cpu") as llm:
        told = report(llm.encoder.loaded.encoder.model)
        assert told.graphs
        together = embedded(llm, TEXTS * 3)
        alone = np.concatenate([embedded(llm, text) for text in TEXTS])
    assert np.abs(together - np.tile(alone, (3, 1))).max() < 1e-5
    assert np.abs(alone - embedded(embedder, TEXTS)).max() < 1e-5


def test_dimensions_and_normalize(embedder: LLM) -> None:
    whole, raw = embedded(embedder, "fox"), embedded(embedder, "fox", normalize=False)
    assert np.linalg.norm(raw) > 1.5
    cut = embedded(embedder, "fox", dimensions=8)
    assert cut == pytest.approx(whole[:, :8] / np.linalg.norm(whole[:, :8]), abs=1e-6)
    with pytest.raises(UsageError, match="dimensions must be from 1 to 32, got 33"):
        embedder.embed("fox", dimensions=33)


def test_nothing_is_cut_unless_asked(embedder: LLM) -> None:
    long = "fox " * 40
    with pytest.raises(PromptTooLongError, match="the text has 42 tokens and BertModel reads 32"):
        embedder.embed(long)
    with pytest.raises(PromptTooLongError, match="text 1 has 42 tokens"):
        embedder.embed(["fox", long])
    (cut,) = embedder.embed(long, truncate_prompt_tokens=-1)
    assert (len(cut.prompt_token_ids), cut.prompt_token_ids[0], cut.prompt_token_ids[-1]) == (32, 1, 2)
    assert embedder.embed(long, truncate_prompt_tokens=6)[0].prompt_token_ids == (1, 30, 30, 30, 30, 2)
    for wrong in (0, -2, 33):
        with pytest.raises(UsageError, match=r"truncate_prompt_tokens must be -1 or from 1 to 32"):
            embedder.embed("fox", truncate_prompt_tokens=wrong)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([35], "token id 35 is outside the vocabulary, which ends at 34"),
        ([[]], "the text is empty"),
        ([1.5], "must be a string or a list of token ids"),
        ({"promt": "x"}, "did you mean 'prompt'"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_texts_that_are_none(text: Any, message: str, embedder: LLM) -> None:
    with pytest.raises(UsageError, match=message):
        embedder.embed(text)


def test_an_embedder_scores_by_the_cosine(embedder: LLM) -> None:
    one, other, third = embedded(embedder, ["fox", "jumps", "over"])
    scores = [output.outputs.score for output in embedder.score("fox", ["jumps", "over"])]
    assert scores == pytest.approx([float(one @ other), float(one @ third)], abs=1e-6)
    paired = embedder.score(["jumps", "over"], ["fox", "fox"])
    assert [output.outputs.score for output in paired] == pytest.approx(scores, abs=1e-6)
    ranked = embedder.rerank("fox", ["jumps", "fox", "over"], top_n=2)
    assert ranked[0].index == 1
    assert ranked[0].score == pytest.approx(1, abs=1e-6)
    assert len(ranked) == 2
    for wrong in (lambda: embedder.score(["a", "b"], ["a"] * 3), lambda: embedder.rerank("a", "b")):
        with pytest.raises(UsageError):
            wrong()


def logits(directory: Path, *texts: str) -> Any:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    read = tokenizer(*texts, return_tensors="pt", return_token_type_ids=True)
    with torch.inference_mode():
        return model(**read).logits[0]


def test_a_cross_encoder_reads_the_pair(tmp_path: Path, save_tiny_bert: Callable[..., Path]) -> None:
    save_tiny_bert(tmp_path, classes=1)
    with LLM(str(tmp_path), dtype="float32", device="cpu", mode="eager") as llm:
        documents = ["a b c", "fox", "jumps over . a b c d"]
        scores = [output.outputs.score for output in llm.score("fox", documents)]
        expected = [float(logits(tmp_path, "fox", document).sigmoid()) for document in documents]
        assert scores == pytest.approx(expected, abs=1e-5)
        assert [one.index for one in llm.rerank("fox", documents)] == np.argsort(expected)[::-1].tolist()
        assert llm.score("fox " * 40, "a " * 40, truncate_prompt_tokens=-1)[0].prompt_token_ids[-1] == 2
        with pytest.raises(PromptTooLongError, match="the pair has 43 tokens"):
            llm.score("fox", "a " * 39)
        with pytest.raises(UsageError, match="BertForSequenceClassification classifies and has no embeddings"):
            llm.embed("fox")


def test_a_classifier_names_the_likeliest_class(tmp_path: Path, save_tiny_bert: Callable[..., Path]) -> None:
    save_tiny_bert(tmp_path, classes=3, id2label={0: "bad", 1: "fair", 2: "good"})
    with LLM(str(tmp_path), dtype="float32", device="cpu", mode="eager") as llm:
        for text, output in zip(TEXTS, llm.classify(TEXTS), strict=True):
            expected = logits(tmp_path, text).softmax(-1)
            assert output.outputs.probs == pytest.approx(expected.tolist(), abs=1e-5)
            assert output.outputs.label == ["bad", "fair", "good"][int(expected.argmax())]
        with pytest.raises(UsageError, match="has 3 classes, where a score needs a single one"):
            llm.score("a", "b")


def test_dense_layers_follow_the_pooling(
    tmp_path: Path, save_tiny_bert: Callable[..., Path], sentence_files: Callable[..., Any], embedder: LLM
) -> None:
    files = sentence_files(normalize=False)
    files["modules.json"].append({"path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    files["2_Dense/config.json"] = {"in_features": 32, "out_features": 4}
    save_tiny_bert(tmp_path, files=files)
    with pytest.raises(CheckpointError, match=r"2_Dense: neither model\.safetensors nor"):
        LLM(str(tmp_path), device="cpu")
    weight, bias = torch.randn(4, 32), torch.randn(4)
    save_file({"linear.weight": weight, "linear.bias": bias}, tmp_path / "2_Dense" / "model.safetensors")
    with LLM(str(tmp_path), dtype="float32", device="cpu", mode="eager") as llm:
        pooled = torch.from_numpy(embedded(embedder, "fox", normalize=False)[0]).float()
        assert embedded(llm, "fox")[0] == pytest.approx((weight @ pooled + bias).tanh().numpy(), abs=1e-5)


def test_each_kind_of_model_refuses_the_others_calls(
    embedder: LLM, tmp_path: Path, save_tiny_llama: Callable[..., None]
) -> None:
    for call in (lambda: embedder.generate("fox"), lambda: embedder.chat([{"role": "user", "content": "fox"}])):
        with pytest.raises(UsageError, match="is an encoder, which generates nothing: use embed"):
            call()
    save_tiny_llama(tmp_path, 64, 64)
    with (
        LLM(str(tmp_path), device="cpu", skip_tokenizer_init=True) as llm,
        pytest.raises(UsageError, match="generates"),
    ):
        llm.embed("fox")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int8"}, "quantization is for models that generate"),
        ({"offload": "host"}, "offload is for models"),
        ({"memory_gib": 1.0}, "memory_gib is for models"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size or pipeline"),
        ({"model_impl": "paceline"}, "leave out model_impl"),
        ({"max_model_len": 33}, "max_model_len 33 is more than the 32 positions"),
    ],
)
def test_options_that_no_encoder_has(options: dict[str, Any], message: str, tiny_embedder: Path) -> None:
    with pytest.raises((UsageError, UnsupportedModelError), match=message):
        LLM(str(tiny_embedder), device="cpu", **options)


def test_values_that_are_not_finite_are_an_error(
    tmp_path: Path, save_tiny_bert: Callable[..., Path], sentence_files: Callable[..., Any]
) -> None:
    save_tiny_bert(tmp_path, files=sentence_files())
    model = transformers.AutoModel.from_pretrained(tmp_path)
    model.embeddings.word_embeddings.weight.data[30] = float("nan")  # "fox"
    model.save_pretrained(tmp_path)
    with LLM(str(tmp_path), dtype="float32", device="cpu", mode="eager") as llm:
        llm.embed("over")
        with pytest.raises(EngineError, match="text 1 are not finite in float32"):
            llm.embed(["over", "fox"])


def test_without_modules_json_the_mean_is_taken_and_said(
    tmp_path: Path, save_tiny_bert: Callable[..., Path], embedder: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny_bert(tmp_path)
    with LLM(str(tmp_path), dtype="float32", device="cpu", mode="eager") as llm:
        assert embedded(llm, "fox") == pytest.approx(embedded(embedder, "fox"), abs=1e-6)
    assert "has no modules.json: embeddings are the normalised mean" in caplog.text


def test_weights_that_are_missing(tmp_path: Path, save_tiny_bert: Callable[..., Path]) -> None:
    save_tiny_bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="16 tensors of BertModel are missing, the first is"):
        LLM(str(tmp_path), device="cpu")


def test_without_transformers_the_extra_is_named(tiny_embedder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedModelError, match=r"BertModel runs through transformers.*paceline\[fallback\]"):
        LLM(str(tiny_embedder), device="cpu")


def test_auto_is_bfloat16_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for isa, chosen in (("avx512f", torch.float32), ("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16)):
        monkeypatch.setattr(load, "read_cpu", lambda isa=isa: Cpu("x", 1, 1, 1, None, ("fma", isa)))
        assert load.pick_encoder_dtype("auto", cpu) == chosen
        assert load.pick_encoder_dtype("float16", cpu) == load.pick_encoder_dtype(torch.float16, cpu) == torch.float16


@pytest.mark.default_model
@pytest.mark.parametrize(("dtype", "mode"), [("float32", "eager"), ("bfloat16", "auto")])
def test_real_weights_against_transformers_in_float32(minilm: Path, dtype: str, mode: str) -> None:
    texts = [
        "A man is eating food.",
        "The quick brown fox jumps over the lazy dog",
        "x",
        "paceline " * 120,
        "",
        "猫が好き",
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    expected = []
    for text in texts:
        with torch.inference_mode():
            expected.append(model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0))
    with LLM(str(minilm), dtype=dtype, device="cpu", mode=mode) as llm:
        found = torch.from_numpy(embedded(llm, texts)).float()
    cosines = torch.nn.functional.cosine_similarity(found, torch.stack(expected))
    assert cosines.min() > (0.999999 if dtype == "float32" else 0.9998)
