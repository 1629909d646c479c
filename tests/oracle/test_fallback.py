"""Architectures without a family: transformers' own modules over our paged cache give transformers' own logits and
tokens, or are refused by name. Small random models, as in conftest.py."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from paceline import LLM, SamplingParams
from paceline.errors import CheckpointError, UnsupportedModelError, UsageError
from paceline.loading.safetensors_checkpoint import SafetensorsCheckpoint
from paceline.models import fallback_attention
from paceline.models.fallback import TransformersModel, load_fallback, measure, read_fallback_config

VOCAB, WINDOW = 96, 6
GREEDY = SamplingParams(temperature=0, max_tokens=8)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {  # multi-head latent attention: keys of 12 + 8, values of 16
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    **EXPERTS,
}
SLIDING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

# name -> (transformers' config class, its arguments): no family here, nor one planned.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("ApertusConfig", {}),
    "arcee": ("ArceeConfig", {}),
    "biogpt": ("BioGptConfig", {}),  # learned positions, which it would otherwise count from the attention mask
    "cohere": ("CohereConfig", {"logit_scale": 0.3}),
    "cohere2": ("Cohere2Config", {"head_dim": 16, **SLIDING}),
    "deepseek_v3": ("DeepseekV3Config", MLA),
    "ernie4_5": ("Ernie4_5Config", {"head_dim": 16}),
    "exaone4": ("Exaone4Config", SLIDING),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "helium": ("HeliumConfig", {"head_dim": 12}),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", {"head_dim": 16}),
    "jetmoe": ("JetMoeConfig", {"kv_channels": 16, "num_local_experts": 4}),
    "nemotron": ("NemotronConfig", {}),
    "olmo": ("OlmoConfig", {"clip_qkv": 0.5}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, **EXPERTS}),
    "persimmon": ("PersimmonConfig", {}),
    "phi": ("PhiConfig", {}),
    "qwen2_moe": ("Qwen2MoeConfig", {"num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS}),
    "seed_oss": ("SeedOssConfig", {"head_dim": 16}),
}

# name -> (config class, arguments, what the error must say)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertConfig", {"is_decoder": False}, "neither causal nor a sliding window"),
    "bart": ("BartConfig", {"d_model": 48, "is_encoder_decoder": False}, "takes no 'input_ids'"),
    "doge": ("DogeConfig", {"head_dim": 16}, "adds a mask or a bias of its own"),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "head_dim": 16}, "'s_aux', which paceline does not compute"),
    "gptj": ("GPTJConfig", {"rotary_dim": 8}, "none of its layers attends through"),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"]}, "more than keys and values"),
    "llama4_text": (
        "Llama4TextConfig",
        {"attention_chunk_size": 8, "num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 80},
        "neither causal nor a sliding window",
    ),
    "mamba": ("MambaConfig", {}, "takes no 'position_ids'"),
    "rwkv": ("RwkvConfig", {"attention_hidden_size": 48}, "takes no 'position_ids'"),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            **EXPERTS,
            "num_hidden_layers": 4,
        },
        "more than keys and values",
    ),
}


@dataclass(frozen=True)
class Saved:
    """`hf`: transformers' model, float32, eager attention. `directory`: what its save_pretrained wrote."""

    hf: Any
    directory: Path

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits_TV: torch.Tensor = self.hf(torch.tensor([token_ids]), use_cache=False).logits[0]
        return logits_TV.clone()

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        answer = self.hf.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)
        return answer[0, len(prompt) :].tolist()

    def likeliest(self, prompt: list[int], answer: Sequence[int]) -> list[int]:
        """The token that transformers finds likeliest at each place of the answer: greedy, in one forward."""
        return self.logits([*prompt, *answer])[len(prompt) - 1 : -1].argmax(-1).tolist()

    def load(self, dtype: torch.dtype = torch.float32) -> TransformersModel:
        with SafetensorsCheckpoint(self.directory) as checkpoint:
            return load_fallback(checkpoint, read_fallback_config(checkpoint.config), dtype=dtype)


Save = Callable[..., Saved]


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory, redraw: Callable[[torch.nn.Module, int], None]) -> Save:
    """`save(config class, arguments)`: a small random model, made once a session."""
    import transformers

    made: dict[str, Saved] = {}

    def make(config_class: str, arguments: dict[str, Any]) -> Saved:
        key = config_class + repr(arguments)
        if key not in made:
            config = getattr(transformers, config_class)(**{**SIZES, **arguments})
            hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            redraw(hf, 11)
            directory = tmp_path_factory.mktemp(config_class)
            hf.save_pretrained(directory)
            made[key] = Saved(hf, directory)
        return made[key]

    return make


@pytest.mark.parametrize("name", RUNS)
def test_logits_are_transformers(name, save, pages, prompts, relative_error):
    saved = save(*RUNS[name])
    model = saved.load()
    for chunk in (1, 7, None):
        for found, prompt in zip(pages(model, prompts).run(chunk), prompts, strict=True):
            assert relative_error(found, saved.logits(prompt)) < 2e-5, chunk


@pytest.mark.parametrize("name", RUNS)
def test_greedy_tokens_are_transformers(name, save, prompts):
    saved = save(*RUNS[name])
    long = prompts[-1] + prompts[-2]
    asked = [*prompts, long, [*long, 5]]  # the last continues another: its prefix comes from the cache
    options = {"max_num_batched_tokens": 32, "max_num_seqs": 8, "block_size": 4, "num_blocks": 64}
    with LLM(str(saved.directory), dtype="float32", skip_tokenizer_init=True, max_model_len=128, **options) as llm:
        assert llm.model.implementation == "transformers"
        first = llm.generate([{"prompt_token_ids": prompt} for prompt in asked[:-1]], GREEDY)
        last = llm.generate({"prompt_token_ids": asked[-1]}, GREEDY)
    for prompt, output in zip(asked, [*first, *last], strict=True):
        answer = output.outputs[0]
        assert answer.error is None
        assert list(answer.token_ids) == saved.likeliest(prompt, answer.token_ids)
    assert list(answer.token_ids) == saved.greedy(prompt, 8)
    assert last[0].num_cached_tokens >= len(long) // 4 * 4 - 4


@pytest.mark.parametrize("name", REFUSED)
def test_what_paged_attention_does_not_compute_is_refused(name, save):
    config_class, arguments, said = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=said):
        save(config_class, arguments).load()


@pytest.mark.parametrize("name", ["llama-llama3", "qwen2-window", "gemma2", "gemma3"])
def test_a_family_forced_through_transformers_equals_ours(name, tiny_model, pages, prompts, relative_error):
    tiny = tiny_model(name)
    with SafetensorsCheckpoint(tiny.directory) as checkpoint:
        theirs = load_fallback(checkpoint, read_fallback_config(checkpoint.config), dtype=torch.float32)
    assert {(group.window, group.layers) for group in theirs.kv_groups} == {
        (group.window, group.layers) for group in tiny.config.kv_groups
    }
    found, expected = pages(theirs, prompts).run(7), pages(tiny.decoder(), prompts).run(7)
    for ours, their in zip(expected, found, strict=True):
        assert relative_error(their, ours) < 2e-5


@pytest.mark.parametrize("name", ["phi", "qwen2_moe", "exaone4"])
def test_half_precision_passes_the_check(name, save):
    assert save(*RUNS[name]).load(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_a_hidden_state_is_seen_in_half_precision_too(name, save):
    with pytest.raises(UnsupportedModelError, match="more than keys and values"):
        save(*REFUSED[name][:2]).load(torch.bfloat16)


@pytest.mark.parametrize("name", ["cohere", "deepseek_v3", "phi", "qwen2_moe"])
def test_the_sizes_are_those_of_the_loaded_tensors(name, save):
    saved = save(*RUNS[name])
    config = read_fallback_config(json.loads((saved.directory / "config.json").read_text()))
    loaded = saved.load()
    assert measure(config, torch.float32).weights == sum(parameter.nbytes for parameter in loaded.parameters())


def test_keys_and_values_of_two_sizes_are_both_padded_to_the_larger(save):
    (group,) = save(*RUNS["deepseek_v3"]).load().kv_groups
    assert (group.num_kv_heads, group.head_dim) == (4, 20)


def test_a_wrong_scale_fails_the_check(save, monkeypatch):
    real = fallback_attention.paged_attention
    monkeypatch.setattr(fallback_attention, "paged_attention", lambda *a, scale, **k: real(*a, scale=scale * 1.1, **k))
    with pytest.raises(UnsupportedModelError, match=r"off by .* over a paged cache, and by .* in pieces"):
        save(*RUNS["phi"]).load()


def test_a_forward_that_attends_in_another_order_is_refused(save, pages):
    model = save(*RUNS["phi"]).load()
    model.calls = model.calls[::-1]
    with pytest.raises(UnsupportedModelError, match="PhiAttention of layer 0 attends in another order"):
        pages(model, [[1, 2, 3]]).run()
    model.calls = [*model.calls[::-1], model.calls[0]]
    with pytest.raises(UnsupportedModelError, match="3 attention calls in a forward that had 4"):
        pages(model, [[1, 2, 3]]).run()


def test_the_log_says_which_model_and_what_is_slower(save, caplog):
    saved = save(*RUNS["phi"])
    with caplog.at_level(logging.WARNING, "paceline"), LLM(str(saved.directory), skip_tokenizer_init=True):
        pass
    (said,) = [record.message for record in caplog.records if "transformers" in record.message]
    assert said.startswith("PhiForCausalLM runs through transformers' own modules, which is slower (no fused")
    assert said.endswith("paceline has no family for it")


def test_a_refusal_names_both_reasons(save):
    saved = save(*REFUSED["gpt_oss"][:2])
    with pytest.raises(UnsupportedModelError, match=r"no family for it, and through transformers .*'s_aux'"):
        LLM(str(saved.directory), skip_tokenizer_init=True)


def test_model_impl_decides(save, tiny_model):
    llama, phi = str(tiny_model("llama").directory), str(save(*RUNS["phi"]).directory)
    with LLM(llama, skip_tokenizer_init=True) as llm:
        assert llm.model.implementation == "paceline"
    with LLM(llama, skip_tokenizer_init=True, model_impl="transformers") as llm:
        assert llm.model.implementation == "transformers"
    with pytest.raises(UnsupportedModelError, match="unknown architecture 'PhiForCausalLM'"):
        LLM(phi, skip_tokenizer_init=True, model_impl="paceline")
    with pytest.raises(UsageError, match="unknown model_impl 'vllm'"):
        LLM(phi, skip_tokenizer_init=True, model_impl="vllm")
    with pytest.raises(UsageError, match="quantization='int8' needs a model that paceline defines itself"):
        LLM(phi, skip_tokenizer_init=True, quantization="int8")


def altered(saved: Saved, directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of the checkpoint with other tensors."""
    tensors = load_file(saved.directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text((saved.directory / "config.json").read_text())
    return directory


def test_a_missing_tensor_is_named(save, tmp_path):
    name = "model.layers.1.mlp.fc1.bias"
    directory = altered(save(*RUNS["phi"]), tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"1 tensors of PhiForCausalLM are missing .* '{name}'"):
        Saved(None, directory).load()


def test_a_tensor_of_the_wrong_shape_is_refused(save, tmp_path):
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.fc1.bias"] = tensors["model.layers.1.mlp.fc1.bias"][:-1].clone()

    with pytest.raises(
        CheckpointError, match=r"tensor 'model.layers.1.mlp.fc1.bias' has shape \[79\], expected \[80\]"
    ):
        Saved(None, altered(save(*RUNS["phi"]), tmp_path, cut)).load()


def test_a_tensor_too_many_is_told(save, tmp_path, caplog):
    directory = altered(save(*RUNS["phi"]), tmp_path, lambda tensors: tensors.update(extra=torch.ones(2)))
    with caplog.at_level(logging.WARNING, "paceline"):
        Saved(None, directory).load()
    assert "1 tensors of the checkpoint are not used by this model: extra" in caplog.text
