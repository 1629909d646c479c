"""A Hugging Face config.json and generation_config.json, rebuilt from GGUF metadata.

GGUF says less than config.json: what an architecture fixes (activation, layer pattern) is a constant here, as it is in
llama.cpp, and what only the tensors tell (biases, tied embeddings) is seen from their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paceline.errors import UnsupportedModelError
from paceline.loading.gguf_metadata import Metadata
from paceline.loading.gguf_names import MIXTRAL, Dialect
from paceline.loading.gguf_rope import rope_scaling

Config = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]  # by Hugging Face name
Factors = Mapping[str, Sequence[float]]  # of rotary frequencies, by GGUF name

# Every n-th layer sees the whole context, the others a window.
GEMMA_PERIOD = {"gemma2": 2, "gemma3": 6}
# The 27B models scale queries by (hidden / heads)**-0.5, all others by head_dim**-0.5; only their depth tells them.
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
GEMMA3_LOCAL_THETA = 10000.0
SMOLLM3_ROPE_PERIOD = 4  # every 4th layer has no rotary embedding
OLMO3_PERIOD = 4  # every 4th layer sees the whole context
STARCODER2_WINDOW = 4096

# Tokens that end a turn in every model that has them; converters record at most one of them as eos.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")


def hf_config(metadata: Metadata, dialect: Dialect, shapes: Shapes, factors: Factors) -> Config:
    """config.json of the model. `shapes`: of the tensors. `factors`: see rope_scaling().

    Raises CheckpointError for metadata that is missing or impossible, UnsupportedModelError for what we cannot run.
    """
    kind, class_name, build = ARCHITECTURES[_model(metadata, dialect)]
    config = {
        "model_type": kind,
        "architectures": [class_name],
        "vocab_size": shapes[dialect.embedding][0],
        "tie_word_embeddings": dialect.head not in shapes,
        **build(metadata, shapes, factors),
    }
    metadata.check()
    return config


def _model(metadata: Metadata, dialect: Dialect) -> str:
    """The key in ARCHITECTURES: two of GGUF's names stand for two models each."""
    if dialect is MIXTRAL:
        return "mixtral"
    return (
        "olmo3"
        if metadata.architecture == "olmo2" and metadata.has("attention.sliding_window")
        else (metadata.architecture)
    )


def _sizes(metadata: Metadata) -> Config:
    """In the words of Llama's config.json, which most others use."""
    return {
        "hidden_size": metadata.integer("embedding_length"),
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": metadata.integer("attention.head_count"),
        "intermediate_size": metadata.integer("feed_forward_length"),
        "max_position_embeddings": metadata.integer("context_length"),
    }


def _rotary(metadata: Metadata, factors: Factors, *, partial: str | None = None) -> Config:
    """Head size and rotary embedding. `partial`: the config's key for the rotated part of a head, None for no such."""
    hidden, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    head_dim = metadata.integer("attention.key_length", max(hidden // heads, 1))
    value_dim = metadata.integer("attention.value_length", head_dim)
    rope_dim = metadata.integer("rope.dimension_count", head_dim)
    if value_dim != head_dim or rope_dim > head_dim or rope_dim % 2 or (partial is None and rope_dim != head_dim):
        raise UnsupportedModelError(
            f"{metadata.path}: head size {head_dim}, values of {value_dim} and rotary size {rope_dim} differ, "
            "which is not supported"
        )
    theta = metadata.number("rope.freq_base", 10000.0)
    config = {"rope_theta": theta, "rope_scaling": rope_scaling(metadata, factors, theta, rope_dim)}
    if partial is not None:
        config[partial] = rope_dim / head_dim
    if head_dim * heads != hidden or metadata.has("attention.key_length"):
        config["head_dim"] = head_dim
    return config


def _llama(metadata: Metadata, shapes: Shapes, factors: Factors, *, partial: str | None = None) -> Config:
    """What Llama's config.json and all that follow it have in common."""
    return {
        "hidden_act": "silu",
        **_sizes(metadata),
        **_rotary(metadata, factors, partial=partial),
        "num_key_value_heads": _kv_heads(metadata),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
    }


def _kv_heads(metadata: Metadata) -> int:
    return metadata.integer("attention.head_count_kv", metadata.integer("attention.head_count"))


def _biased_llama(metadata: Metadata, shapes: Shapes, factors: Factors) -> Config:
    return {
        **_llama(metadata, shapes, factors),
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in shapes,
    }


def _qwen3(metadata: Metadata, shapes: Shapes, factors: Factors) -> Config:
    config = _llama(metadata, shapes, factors)
    return {"head_dim": config["hidden_size"] // config["num_attention_heads"], **config}


def _qwen3_moe(metadata: Metadata, shapes: Shapes, factors: Factors) -> Config:
    """Every layer has experts, whose weights are normalised: so does llama.cpp, and so do all Qwen3 models."""
    return {
        **_qwen3(metadata, shapes, factors),
        "num_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _mixtral(metadata: Metadata, shapes: Shapes, factors: Factors) -> Config:
    return {
        **_llama(metadata, shapes, factors),
        "num_local_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
    }


def _smollm3(metadata: Metadata, shapes: Shapes, factors: Factors) -> Config:
    layers = metadata.integer("block_count")
    return {
        **_biased_llama(metadata, shapes, factors),
        "no_rope_layer_interval": SMOLLM3_ROPE_PERIOD,
        "no_rope_layers": [int((layer + 1) % SMOLLM3_ROPE_PERIOD != 0) for layer in range(layers)],
    }


def _granite(metadata: Metadata, shapes: Shapes, factors: Factors) -> Config:
    return {
        **_biased_llama(metadata, shapes, factors),
        "attention_multiplier": metadata.number("attention.scale", 1.0),
        "embedding_multiplier": metadata.number("embedding_scale", 1.0),
        "residual_multiplier": metadata.number("residual_scale", 1.0),
        "logits_scaling": metadata.number("logit_scale", 1.0),
    }


def _phi3(metadata: Metadata, shapes: Shapes, factors: Factors) -> Config:
    return {
        **_llama(metadata, shapes, factors, partial="partial_rotary_factor"),
        "original_max_position_embeddings": metadata.integer("rope.scaling.original_context_length"),
        "sliding_window": metadata.integer("attention.sliding_window", 0, least=0) or None,
    }


def _stablelm(metadata: Metadata, shapes: Shapes, factors: Factors) -> Config:
    return {
        "hidden_act": "silu",
        **_sizes(metadata),
        **_rotary(metadata, factors, partial="partial_rotary_factor"),
        "num_key_value_heads": _kv_heads(metadata),
        "layer_norm_eps": metadata.number("attention.layer_norm_epsilon"),
        "use_qkv_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "qk_layernorm": "model.layers.0.self_attn.q_layernorm.norms.0.weight" in shapes,
        "use_parallel_residual": metadata.flag("use_parallel_residual", True),
    }


def _olmo3(metadata: Metadata, shapes: Shapes, factors: Factors) -> Config:
    """OLMo 2 with windows, and a rotary embedding that is scaled in the other layers only. Its first converter wrote
    YaRN's factor for the attention under LongRoPE's key."""
    config, layers = _llama(metadata, shapes, factors), metadata.integer("block_count")
    if config["rope_scaling"] and metadata.has("rope.scaling.attn_factor"):
        config["rope_scaling"]["attention_factor"] = metadata.number("rope.scaling.attn_factor")
    windowed = [(layer + 1) % OLMO3_PERIOD != 0 for layer in range(layers)]
    windowed = metadata.flags("attention.sliding_window_pattern", windowed)
    return {
        **config,
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windowed],
    }


def _starcoder2(metadata: Metadata, shapes: Shapes, factors: Factors) -> Config:
    """The window is that of all published sizes: the files do not record it."""
    return {
        "hidden_act": "gelu_pytorch_tanh",
        **_sizes(metadata),
        **_rotary(metadata, factors),
        "num_key_value_heads": _kv_heads(metadata),
        "norm_epsilon": metadata.number("attention.layer_norm_epsilon"),
        "use_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "sliding_window": STARCODER2_WINDOW,
    }


def _mpt(metadata: Metadata, shapes: Shapes, factors: Factors) -> Config:
    """ALiBi and as many key-value heads as heads: another MPT has tensors that have no place here."""
    hidden, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    clip = metadata.number("attention.clamp_kqv", 0.0)
    if _kv_heads(metadata) != heads:
        raise UnsupportedModelError(
            f"{metadata.path}: an MPT with {_kv_heads(metadata)} key-value heads for {heads} heads is not supported; "
            "use the model's safetensors files"
        )
    return {
        "d_model": hidden,
        "n_layers": metadata.integer("block_count"),
        "n_heads": heads,
        "expansion_ratio": metadata.integer("feed_forward_length") // hidden,
        "max_seq_len": metadata.integer("context_length"),
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon"),
        "no_bias": True,
        "attn_config": {
            "alibi": metadata.number("attention.max_alibi_bias", 0.0) > 0,
            "alibi_bias_max": int(metadata.number("attention.max_alibi_bias", 0.0)),
            "clip_qkv": clip or None,
        },
    }


def _gpt2(metadata: Metadata, shapes: Shapes, factors: Factors) -> Config:
    return {
        "activation_function": "gelu_new",
        "n_embd": metadata.integer("embedding_length"),
        "n_layer": metadata.integer("block_count"),
        "n_head": metadata.integer("attention.head_count"),
        "n_inner": metadata.integer("feed_forward_length"),
        "n_positions": metadata.integer("context_length"),
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon"),
    }


def _gpt_neox(metadata: Metadata, shapes: Shapes, factors: Factors) -> Config:
    rotary = _rotary(metadata, factors, partial="rotary_pct")
    return {
        "hidden_act": "gelu",
        **_sizes(metadata),
        "rotary_emb_base": rotary.pop("rope_theta"),
        **rotary,
        "layer_norm_eps": metadata.number("attention.layer_norm_epsilon"),
        "use_parallel_residual": metadata.flag("use_parallel_residual", True),
        "attention_bias": "gpt_neox.layers.0.attention.query_key_value.bias" in shapes,
    }


def _bloom(metadata: Metadata, shapes: Shapes, factors: Factors) -> Config:
    metadata.integer("attention.head_count_kv", 1)
    metadata.integer("feed_forward_length")
    return {
        "hidden_size": metadata.integer("embedding_length"),
        "n_layer": metadata.integer("block_count"),
        "n_head": metadata.integer("attention.head_count"),
        "seq_length": metadata.integer("context_length"),
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon"),
        "apply_residual_connection_post_layernorm": False,
    }


def _falcon(metadata: Metadata, shapes: Shapes, factors: Factors) -> Config:
    """One key-value head: the layout of Falcon 7B. Several: that of 40B (two norms) and of Falcon 2 11B (one)."""
    sizes, kv_heads = _sizes(metadata), _kv_heads(metadata)
    new = kv_heads > 1
    if new and kv_heads == sizes["num_attention_heads"]:
        raise UnsupportedModelError(
            f"{metadata.path}: a Falcon with as many key-value heads as heads, whose order of rows is ambiguous; "
            "use the model's safetensors files"
        )
    return {
        "activation": "gelu",
        "ffn_hidden_size": sizes.pop("intermediate_size"),
        **sizes,
        **_rotary(metadata, factors),
        "num_kv_heads": kv_heads,
        "new_decoder_architecture": new,
        "multi_query": True,
        "num_ln_in_parallel_attn": (2 if "transformer.h.0.ln_attn.weight" in shapes else 1) if new else None,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon"),
    }


def _gemma(metadata: Metadata, shapes: Shapes, factors: Factors) -> Config:
    architecture, config = metadata.architecture, _qwen3(metadata, shapes, factors)
    del config["hidden_act"]
    query_scalar, layers = config["head_dim"], config["num_hidden_layers"]
    if layers == GEMMA_27B_LAYERS[architecture]:
        query_scalar = config["hidden_size"] // config["num_attention_heads"]
    period = GEMMA_PERIOD[architecture]
    config |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": metadata.integer("attention.sliding_window"),
        "query_pre_attn_scalar": query_scalar,
        "layer_types": [
            "full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)
        ],
    }
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        config[key] = metadata.number(key) if metadata.has(key) else None
    if architecture == "gemma3":
        config["rope_local_base_freq"] = metadata.number("rope.freq_base_swa", GEMMA3_LOCAL_THETA)
    return config


# GGUF's name -> `model_type`, the class, and what writes the rest.
ARCHITECTURES: Mapping[str, tuple[str, str, Callable[[Metadata, Shapes, Factors], Config]]] = {
    "llama": ("llama", "LlamaForCausalLM", _biased_llama),
    "mixtral": ("mixtral", "MixtralForCausalLM", _mixtral),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", _llama),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", _qwen3),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe),
    "gemma2": ("gemma2", "Gemma2ForCausalLM", _gemma),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", _gemma),
    "phi3": ("phi3", "Phi3ForCausalLM", _phi3),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM", _smollm3),
    "granite": ("granite", "GraniteForCausalLM", _granite),
    "olmo2": ("olmo2", "Olmo2ForCausalLM", _llama),
    "olmo3": ("olmo3", "Olmo3ForCausalLM", _olmo3),
    "stablelm": ("stablelm", "StableLmForCausalLM", _stablelm),
    "starcoder2": ("starcoder2", "Starcoder2ForCausalLM", _starcoder2),
    "gpt2": ("gpt2", "GPT2LMHeadModel", _gpt2),
    "gptneox": ("gpt_neox", "GPTNeoXForCausalLM", _gpt_neox),
    "bloom": ("bloom", "BloomForCausalLM", _bloom),
    "falcon": ("falcon", "FalconForCausalLM", _falcon),
    "mpt": ("mpt", "MptForCausalLM", _mpt),
}


def generation_config(metadata: Mapping[str, Any]) -> Config:
    """Token ids of generation_config.json; `eos_token_id` lists every token that ends a reply, lowest first.

    Those recorded as eos, eot or eom, and those of TURN_ENDS in the vocabulary: Qwen's and Gemma's converters record
    only one of the two that the original generation_config.json lists.
    """
    ids = {metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")}
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        ids.update(tokens.index(token) for token in TURN_ENDS if token in tokens)
    config: Config = {"eos_token_id": sorted(token for token in ids if isinstance(token, int))}
    for ours, theirs in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        token = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if isinstance(token, int):
            config[ours] = token
    return config if config["eos_token_id"] else {key: value for key, value in config.items() if key != "eos_token_id"}
