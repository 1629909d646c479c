"""Checkpoints that are not quite as they should be, and pickled ones: each loads as transformers loads it, and says so,
or is one clear line."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from paceline.errors import CheckpointError, UsageError
from paceline.llm import LLM
from paceline.sampling.params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SCORED = SamplingParams(max_tokens=0, prompt_logprobs=0)


@pytest.fixture
def directory(tiny_directory: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(tiny_directory, tmp_path / "model"))


def change_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def transformers_logprobs(directory: Path, token_ids: list[int]) -> list[float]:
    """Of each token but the first."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = model(torch.tensor([token_ids])).logits[0].log_softmax(dim=-1)
    return [logprobs[i, token].item() for i, token in enumerate(token_ids[1:])]


def test_weights_tied_and_stored_twice_are_what_transformers_takes(directory, caplog):
    change_config(directory, tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    with LLM(str(directory), device="cpu") as llm:
        output = llm.generate("hello", SCORED)[0]
    ids = list(output.prompt_token_ids)
    found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
    assert found == pytest.approx(transformers_logprobs(directory, ids), abs=1e-4)
    assert "differs from 'model.embed_tokens.weight': it is used as it is, untied" in caplog.text


def test_an_equal_copy_of_tied_weights_is_no_news(directory, caplog):
    change_config(directory, tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with LLM(str(directory), device="cpu", generation_config="none") as llm:
        assert llm.model.config.tie_embeddings
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_a_vocabulary_larger_than_the_embedding(directory):
    change_config(directory, vocab_size=40)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight' has 32 rows and config\.json's vocab_size is 40"):
        LLM(str(directory), device="cpu")


def test_tokens_that_the_model_has_not_harm_no_request(directory, caplog):
    """An added token and an end token past the embedding: neither may reach the logits, where it would be fatal."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 32, "content": "<extra>"})
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    change_config(directory, eos_token_id=[2, 40])
    with caplog.at_level("INFO"), LLM(str(directory), device="cpu") as llm:
        assert "adds tokens that the model's vocabulary of 32 has not ('<extra>')" in caplog.text
        assert "end-of-sequence ids [40] are not in the model's vocabulary of 32: ignored" in caplog.text
        expected = llm.generate("hello", GREEDY)[0].outputs[0].token_ids
        params = SamplingParams(temperature=0, max_tokens=6, min_tokens=6, bad_words=["<extra>"])
        assert len(llm.generate("hello", params)[0].outputs[0].token_ids) == 6
        with pytest.raises(UsageError, match="prompt token id 32 is outside the vocabulary, which ends at 31"):
            llm.generate("hello<extra>", GREEDY)
        assert llm.generate("hello", GREEDY)[0].outputs[0].token_ids == expected


def test_pickled_weights_give_the_same_text(directory, tiny_directory):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin")
    with LLM(str(tiny_directory), device="cpu") as safe, LLM(str(directory), device="cpu") as pickled:
        expected = [output.outputs[0].text for output in safe.generate(["hello", "abc"], GREEDY)]
        assert [output.outputs[0].text for output in pickled.generate(["hello", "abc"], GREEDY)] == expected


def test_a_model_without_a_tokenizer_runs_on_ids_alone(directory):
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json: copy it from the model's repository"):
        LLM(str(directory), device="cpu")
    with LLM(str(directory), device="cpu", skip_tokenizer_init=True) as llm:
        assert len(llm.generate([3, 4], GREEDY)[0].outputs[0].token_ids) == 6
