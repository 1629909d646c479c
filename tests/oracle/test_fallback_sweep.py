"""Every causal language model that the installed transformers knows, made small: it runs with transformers' own logits,
or it is refused with a reason; never anything else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from paceline.errors import UnsupportedModelError
from paceline.models.fallback import FallbackConfig, TransformersModel

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 6,
    "attention_chunk_size": 6,
    "d_model": 48,
    "ffn_hidden_size": 80,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "rotary_dim": 8,
    "decoder_ffn_dim": 80,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 12,
    "mamba_expand": 2,
    "mamba_d_state": 8,
    "attention_head_size": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    "intermediate_size_mlp": 80,
    "word_embed_proj_dim": 48,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 96,
    "laurel_rank": 8,
    "max_window_layers": 2,
}
# Tried in order, until transformers' own forward works: head sizes and counts that some models tie to each other.
ADJUSTMENTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4, "head_dim": 8},  # multi-head latent attention: the rotary part's size
    {"num_key_value_heads": 4, "head_dim": 12},
    {"num_key_value_heads": 4, "head_dim": 12, "num_experts_per_tok": 1, "sliding_window": None},
    {"num_key_value_heads": 4, "head_dim": 20},
)
MOST_PARAMETERS = 20_000_000


def small_configs(config_class: Any) -> Iterator[Any]:
    try:
        whole = config_class()
    except Exception:  # its own defaults are refused
        return
    for adjustment in ADJUSTMENTS:
        sizes = {**SMALL, **adjustment}

        def arguments(config: Any, sizes: dict[str, Any] = sizes) -> dict[str, Any]:
            settable = set(vars(config)) | set(config.attribute_map)
            found = {key: value for key, value in sizes.items() if key in settable}
            if getattr(config, "sliding_window", None) is None:
                found.pop("sliding_window", None)
            if isinstance(getattr(config, "layer_types", None), list) and "layer_types" in settable:
                found["layer_types"] = (list(dict.fromkeys(config.layer_types)) * 4)[:4]
            return found

        text = getattr(whole, "text_config", None)
        given = arguments(whole) if text is None else {"text_config": arguments(text)}
        try:
            yield config_class(**given)
        except Exception:  # sizes that this model's own checks refuse
            continue


def outcome(model_type: str, redraw: Any, pages: Any, prompts: list[list[int]], relative_error: Any) -> tuple[str, str]:
    """("equal" | "refused" | "wrong" | "not built", the reason)."""
    import transformers

    reason = "too large"
    for hf_config in small_configs(transformers.CONFIG_MAPPING[model_type]):
        classes = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]
        model_class = classes[0] if isinstance(classes, tuple) else classes
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in model_class._from_config(hf_config).parameters())
            if count > MOST_PARAMETERS:
                continue
            hf = model_class._from_config(hf_config, attn_implementation="eager").eval()
            redraw(hf, 5)
            with torch.inference_mode():
                expected = [hf(torch.tensor([p]), use_cache=False).logits[0].float().clone() for p in prompts]
        except Exception as error:  # transformers' own forward does not work with these sizes
            reason = repr(error)[:120]
            continue
        config = FallbackConfig(model_class.__name__, model_class, hf_config)
        try:
            model = TransformersModel(hf, config, torch.float32, torch.device("cpu"))
        except UnsupportedModelError as error:
            return "refused", str(error)
        errors = [
            relative_error(found, wanted)
            for chunk in (1, 7, None)
            for found, wanted in zip(pages(model, prompts).run(chunk), expected, strict=True)
        ]
        return ("equal" if max(errors) < 1e-4 else "wrong"), f"{max(errors):.0e} {model.kv_groups}"
    return "not built", reason


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_every_causal_language_model_runs_equal_or_is_refused(redraw, pages, prompts, relative_error, capsys):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = {name: outcome(name, redraw, pages, prompts, relative_error) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    with capsys.disabled():
        for name, (verdict, reason) in found.items():
            print(f"{name}: {verdict}: {reason}")
    assert [name for name, (verdict, _) in found.items() if verdict == "wrong"] == []
    assert sum(verdict == "equal" for verdict, _ in found.values()) >= 80
    assert all("fail here" not in reason for verdict, reason in found.values() if verdict == "refused")
