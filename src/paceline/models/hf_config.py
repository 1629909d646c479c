"""Read a Hugging Face config.json: both spellings (transformers 4 and 5), and no feature passed over in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.log import get_logger
from paceline.registry import unknown

log = get_logger(__name__)

T = TypeVar("T")
Activation = Literal["silu", "gelu_tanh", "gelu", "relu"]

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

# Keys that change the result where they hold another value than these: refused by name in a family that reads them not.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "_remove_final_layer_norm": (None, False),
    "add_cross_attention": (None, False),
    "alibi_bias_max": (None, 8),
    "apply_residual_connection_post_layernorm": (None, False),
    "attention_multiplier": (None,),
    "attn_type": (None, "multihead_attention"),
    "attn_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "do_layer_norm_before": (None, True),
    "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None,),
    "full_attn_mod": (None, 1),
    "interpolate_factor": (None, 1),
    "is_encoder_decoder": (None, False),
    "layer_norm_elementwise_affine": (None, True),
    "llama_4_scaling_beta": (None, 0),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "mlp_bias": (None, False),
    "mlp_type": (None, "default"),
    "no_bias": (None, True),
    "norm_type": (None, "layer_norm", "layernorm", "low_precision_layernorm"),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0, 1),
    "partial_rotary_factor": (None, 1),
    "prefix_lm": (None, False),
    "qk_layernorm": (None, False),
    "qk_ln": (None, False),
    "quantization_config": (None, {}),
    "reorder_and_upcast_attn": (None, False),
    "residual_multiplier": (None, 1),
    "rope_interleaved": (None, False),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "scale_attn_weights": (None, True),
    "sliding_window": (None,),
    "use_bidirectional_attention": (None, False),
    "use_mrope": (None, False),
    "vision_config": (None, {}),
}

# Keys that change no logit: bookkeeping, training, special tokens, generation defaults, how others run the model.
INERT = frozenset(
    {
        *("_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "auto_map"),
        *("attention_dropout", "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "dtype"),
        *("eos_token_id", "hidden_dropout", "id2label", "initializer_range", "is_llama_config", "label2id"),
        *("model_type", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "tokenizer_class"),
        *("torch_dtype", "transformers.js_config", "transformers_version", "unk_token_id", "unsloth_fixed"),
        *("unsloth_version", "use_cache"),
        # The training of routers.
        *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
        # Dropout and initialisation.
        *("activation_dropout", "attention_probs_dropout_prob", "attn_pdrop", "classifier_dropout", "dropout"),
        *("embd_pdrop", "embedding_dropout", "embedding_fraction", "emb_pdrop", "hidden_dropout_prob", "init_config"),
        *("init_device", "init_std", "layerdrop", "resid_pdrop", "residual_dropout"),
        # GPT-2's head for classification, and what is no part of the model.
        *("is_decoder", "n_ctx", "output_attentions", "output_hidden_states", "prefix", "summary_activation"),
        *("summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
        *("task_specific_params", "tokenizer_name", "verbose"),
        # How BLOOM, MPT and StarCoder are run and rounded (here every softmax and norm is taken in float32); Falcon's
        # repetition of its MLP's width.
        *("attention_softmax_in_fp32", "attn_impl", "attn_uses_sequence_id", "bias_dropout_fusion", "ff_factor"),
        *("inference_runner", "masked_softmax_fusion", "offset_alibi", "pad_key_length"),
        *("scale_attention_softmax_in_fp32", "skip_bias_add", "skip_bias_add_qkv", "slow_but_exact"),
        *("validate_runner_input",),
    }
)


_KINDS: tuple[tuple[tuple[Any, ...], str], ...] = (  # in this order: True is an int too
    ((bool,), "true or false"),
    ((int, float), "a number"),
    ((str,), "a string"),
    ((Mapping,), "an object"),
    ((Sequence,), "a list"),
)


class HFConfig:
    """A config.json being read. It remembers which keys a family asked for, so that `check` can judge the others."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.asked: set[str] = set()

    def require(self, key: str) -> Any:
        """The value of `key`. Raises CheckpointError naming the key where it is absent or null."""
        value = self.optional(key)
        if value is None:
            raise CheckpointError(f"config.json has no '{key}': it is incomplete, download the model again")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """The value of `key`, a positive whole number. Raises CheckpointError naming the key and what it holds."""
        value = self.require(key) if default is None else self.optional(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json sets '{key}' to {value!r}: expected a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The value of `key`, a number above 0. Raises CheckpointError naming the key and what it holds."""
        value = self.require(key) if default is None else self.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise CheckpointError(f"config.json sets '{key}' to {value!r}: expected a number above 0")
        return float(value)

    def get(self, key: str, default: T) -> T:
        """The value of `key`, or `default` where it is absent or null. Raises CheckpointError naming the key and what
        it holds where that is of another kind than the default: a number, true or false, a string, ..."""
        value = self.optional(key)
        if value is None:
            return default
        accepted, kind = next((types, name) for types, name in _KINDS if isinstance(default, types))
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            raise CheckpointError(f"config.json sets '{key}' to {value!r}: expected {kind}")
        return value  # type: ignore[no-any-return]

    def optional(self, key: str, absent: Any = None) -> Any:
        """The value of `key`, null included; `absent` where there is none."""
        self.asked.add(key)
        return self.values.get(key, absent)

    def spelling(self, *keys: str) -> str:
        """Of several names of one setting, the one that config.json uses, or else the first.

        Raises CheckpointError where two of them disagree.
        """
        self.asked.update(keys)
        used = [key for key in keys if self.values.get(key) is not None]
        for key in used[1:]:
            if self.values[key] != self.values[used[0]]:
                raise CheckpointError(
                    f"config.json sets '{used[0]}' to {self.values[used[0]]!r} and '{key}', which means the same, "
                    f"to {self.values[key]!r}: it is inconsistent"
                )
        return used[0] if used else keys[0]

    def check(self) -> None:
        """Judge the keys that the family did not ask for: refuse those known to change the result, log those unknown.

        Raises UnsupportedModelError naming the key and its value.
        """
        unheard = []
        for key in sorted(self.values.keys() - self.asked - INERT):
            value = self.values[key]
            if key in NEUTRAL:
                if value not in NEUTRAL[key]:
                    raise UnsupportedModelError(
                        f"config.json sets '{key}' to {value!r}, which paceline does not implement for this model"
                    )
            elif value not in (None, False):
                unheard.append(key)
        if unheard:
            log.warning("config.json has keys that paceline does not know and ignores: %s", ", ".join(unheard))


def read_activation(hf: HFConfig, key: str, default: str) -> Activation:
    name = hf.get(key, default)
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f"config.json's '{key}': {unknown('activation', str(name), ACTIVATIONS)}")
    return ACTIVATIONS[name]


def read_head_dim(hf: HFConfig, hidden_size: int, num_heads: int) -> int:
    """`head_dim`, or the heads' equal share of the hidden size where the file has none.

    Raises CheckpointError where they cannot share it."""
    if hf.optional("head_dim") is None and hidden_size % num_heads:
        raise CheckpointError(
            f"config.json's hidden size {hidden_size} is not a multiple of its {num_heads} attention heads, "
            "and it has no 'head_dim': it is inconsistent"
        )
    return hf.size("head_dim", hidden_size // num_heads)


def read_windows(hf: HFConfig, default: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """A window a layer, from `layer_types` or, in files older than that key, from `default`; () where all are full."""
    kinds: Sequence[str] = hf.get("layer_types", default)
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(f"config.json's 'layer_types' has {kind!r}, which paceline does not implement")
    if len(kinds) != len(default):
        raise CheckpointError(
            f"config.json has {len(kinds)} 'layer_types' for {len(default)} layers: it is inconsistent"
        )
    if window is None and "sliding_attention" in kinds and hf.optional("sliding_window") is None:
        raise CheckpointError("config.json has layers with sliding attention and no 'sliding_window': it is incomplete")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise CheckpointError(f"config.json sets 'sliding_window' to {window!r}: expected a positive whole number")
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()
