"""The text part of multimodal checkpoints: which config.json describes it, and which tensors are not of it.

For a prompt of text alone the models below compute what their text model computes: rotary embedding in three
dimensions (Qwen-VL) gives all three the same position, and features of images that a middle layer adds (Qwen3-VL's
"deepstack") are not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paceline.errors import UnsupportedModelError
from paceline.registry import unknown

# The names of all tensors that are of no text model begin so, those of transformers 5 after "model.".
OTHER_PARTS = (
    "visual.",
    "vision_tower.",
    "multi_modal_projector.",
    "model.visual.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)

# Keys beside `text_config` that say how images and videos become tokens.
IMAGE_KEYS = frozenset(
    {
        *("boi_token_id", "boi_token_index", "eoi_token_id", "eoi_token_index", "image_seq_length", "image_token_id"),
        *(
            "ignore_index",
            "image_token_index",
            "mm_tokens_per_image",
            "multimodal_projector_bias",
            "projector_hidden_act",
        ),
        *("spatial_merge_size", "video_token_id", "vision_config", "vision_end_token_id", "vision_feature_layer"),
        *("vision_feature_select_strategy", "vision_start_token_id", "vision_token_id"),
    }
)


@dataclass(frozen=True)
class Multimodal:
    """`text`: the kind of its text model, a key of TEXT_MODELS. `varies`: the `model_type` of its text_config may name
    another."""

    text: str
    varies: bool = False


MULTIMODAL: Mapping[str, Multimodal] = {
    "Gemma3ForConditionalGeneration": Multimodal("gemma3_text"),
    "LlavaForConditionalGeneration": Multimodal("llama", varies=True),
    "Mistral3ForConditionalGeneration": Multimodal("mistral", varies=True),
    "Qwen2VLForConditionalGeneration": Multimodal("qwen2_vl_text"),
    "Qwen2_5_VLForConditionalGeneration": Multimodal("qwen2_vl_text"),
    "Qwen3VLForConditionalGeneration": Multimodal("qwen3_vl_text"),
}


@dataclass(frozen=True)
class TextModel:
    """The architecture of a family, and the values that a text_config leaves out because they are transformers'
    defaults: sizes, and what differs from the defaults of the family."""

    architecture: str
    defaults: Mapping[str, Any]


def _sizes(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int | None) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,  # None: as many as there are heads
    }


QWEN2_VL = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_window_layers": 80}
QWEN3_VL = {"rope_theta": 5e5, "max_position_embeddings": 128000}
TEXT_MODELS: Mapping[str, TextModel] = {
    "gemma3_text": TextModel("Gemma3ForCausalLM", _sizes(262208, 2304, 9216, 26, 8, 4)),
    "llama": TextModel("LlamaForCausalLM", _sizes(32000, 4096, 11008, 32, 32, None)),
    "mistral": TextModel("MistralForCausalLM", _sizes(32000, 4096, 14336, 32, 32, 8)),
    "qwen2": TextModel("Qwen2ForCausalLM", _sizes(151936, 4096, 22016, 32, 32, 32)),
    "qwen2_vl_text": TextModel("Qwen2ForCausalLM", {**_sizes(152064, 8192, 29568, 80, 64, 8), **QWEN2_VL}),
    "qwen3": TextModel("Qwen3ForCausalLM", _sizes(151936, 4096, 22016, 32, 32, 32)),
    "qwen3_vl_text": TextModel("Qwen3ForCausalLM", {**_sizes(151936, 4096, 22016, 32, 32, 32), **QWEN3_VL}),
}


def text_config(hf_config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The config.json of the text part of one that names `architecture`, a key of MULTIMODAL.

    Older files have its keys beside the vision's instead of under `text_config`. Raises UnsupportedModelError for a
    text model of another kind than those of TEXT_MODELS.
    """
    outer, nested = MULTIMODAL[architecture], hf_config.get("text_config") or {}
    kind = str(nested.get("model_type", outer.text)) if outer.varies else outer.text
    if kind not in TEXT_MODELS:
        raise UnsupportedModelError(f"config.json's 'text_config': {unknown('model_type', kind, TEXT_MODELS)}")
    text = TEXT_MODELS[kind]
    beside = {key: value for key, value in hf_config.items() if key not in IMAGE_KEYS and key != "text_config"}
    config = {**text.defaults, **beside, **nested, "architectures": [text.architecture]}
    # Said in either place or in none, where the text model's own default holds.
    tied = [values["tie_word_embeddings"] for values in (hf_config, nested) if "tie_word_embeddings" in values]
    return {**config, "tie_word_embeddings": any(tied)} if tied else config
