"""Read a Hugging Face config.json: both spellings (transformers 4 and 5), and no feature passed over in silence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from paceline.config import RopeConfig, RopeKind, RopeScaling
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
        value = self.require(key) if default is None else self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json sets '{key}' to {value!r}: expected a positive whole number")
        return value

    def get(self, key: str, default: T) -> T:
        """The value of `key`, or `default` where it is absent or null."""
        value = self.optional(key)
        return default if value is None else value

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


def read_rope(
    hf: HFConfig,
    head_dim: int,
    *,
    layer_type: str | None = None,
    theta_key: str = "rope_theta",
    default_theta: float = 1e4,
    partial_key: str | None = None,
    default_partial: float = 1.0,
) -> RopeConfig:
    """The rotary embedding of all layers, or of those of `layer_type`.

    transformers 5 writes `rope_parameters` (nested by layer type where there are several); transformers 4 wrote the
    base under `theta_key` and, for the layers that are not windowed, `rope_scaling`. `partial_key`: where a family
    that turns only a part of each head says how much; for others a part is refused.
    """
    parameters: dict[str, Any] = dict(hf.get("rope_parameters", {}))
    if layer_type is not None:
        parameters = dict(parameters.get(layer_type) or {})
    if layer_type != "sliding_attention":
        parameters = {**hf.get("rope_scaling", {}), **parameters}
    partial = parameters.get("partial_rotary_factor")
    if partial_key is not None:
        partial = partial if partial is not None else hf.get(partial_key, default_partial)
    elif partial not in NEUTRAL["partial_rotary_factor"]:
        raise UnsupportedModelError(
            f"config.json sets 'partial_rotary_factor' to {partial!r}, which paceline does not implement for this model"
        )
    dim = int(head_dim * (partial or 1.0))
    if dim < 2 or dim % 2:
        raise CheckpointError(
            f"config.json rotates {dim} of the {head_dim} dimensions of a head, which does not make pairs: "
            "it is inconsistent"
        )
    theta = hf.get(theta_key, default_theta)
    original = parameters.get("original_max_position_embeddings") or hf.optional("original_max_position_embeddings")
    max_position = hf.optional("max_position_embeddings")
    scaling = _rope_scaling(parameters, original, max_position, dim)
    return RopeConfig(float(parameters.get("rope_theta") or theta), dim, scaling)


ROPE_KINDS: Mapping[str, RopeKind] = {
    "linear": "linear",
    "dynamic": "dynamic",
    "yarn": "yarn",
    "llama3": "llama3",
    "longrope": "longrope",
    "su": "longrope",  # its name in the first Phi-3 files
}
# "default" turns nothing; for text alone multimodal rotary embedding gives the three positions of a token one value.
UNSCALED_ROPE = ("default", "mrope")


def _rope_scaling(
    parameters: Mapping[str, Any], original: int | None, max_position: int | None, dim: int
) -> RopeScaling | None:
    name = str(parameters.get("rope_type") or parameters.get("type") or "default")
    if name in UNSCALED_ROPE:
        return None
    if name not in ROPE_KINDS:
        known = [*ROPE_KINDS, *UNSCALED_ROPE]
        raise UnsupportedModelError(f"config.json's rotary embedding: {unknown('rope_type', name, known)}")
    kind, rope = ROPE_KINDS[name], HFConfig(parameters)
    # The trained length: a key of its own, or, for the kinds that stretch at run time, max_position_embeddings.
    trained = int(original or max_position or 8192)
    factor = rope.optional("factor")
    if factor is None and kind in ("yarn", "longrope") and max_position:
        factor = max_position / trained  # DeepSeek-V3, Phi-3: the ratio says it
    if factor is None:
        factor = rope.require("factor")
    if kind == "llama3":
        low, high = float(rope.require("low_freq_factor")), float(rope.require("high_freq_factor"))
        return RopeScaling(kind, float(factor), low, high, trained)
    if kind == "dynamic":
        return RopeScaling(kind, float(factor), original_max_position=int(max_position or trained))
    if kind == "yarn":
        return _read_yarn(rope, float(factor), trained)
    if kind == "longrope":
        return _read_longrope(rope, float(factor), trained, dim)
    return RopeScaling(kind, float(factor))


def _read_yarn(rope: HFConfig, factor: float, trained: int) -> RopeScaling:
    def lengthened(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0

    length = rope.optional("attention_factor")
    if length is None:
        over, under = rope.optional("mscale"), rope.optional("mscale_all_dim")
        length = lengthened(over) / lengthened(under) if over and under else lengthened(1.0)
    return RopeScaling(
        "yarn",
        factor,
        original_max_position=trained,
        beta_fast=float(rope.optional("beta_fast") or 32),
        beta_slow=float(rope.optional("beta_slow") or 1),
        truncate=rope.get("truncate", True),
        attention_factor=float(length),
    )


def _read_longrope(rope: HFConfig, factor: float, trained: int, dim: int) -> RopeScaling:
    length = rope.optional("attention_factor")
    if length is None:
        length = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    factors = {}
    for which in ("short_factor", "long_factor"):
        factors[which] = tuple(float(value) for value in rope.require(which))
        if len(factors[which]) != dim // 2:
            raise CheckpointError(
                f"config.json's '{which}' has {len(factors[which])} values for {dim // 2} pairs of rotated dimensions: "
                "it is inconsistent"
            )
    return RopeScaling(
        "longrope",
        factor,
        original_max_position=trained,
        attention_factor=float(length),
        short_factors=factors["short_factor"],
        long_factors=factors["long_factor"],
    )


def read_max_position(hf: HFConfig, rope: RopeConfig | None, default: int) -> int:
    """The longest context: `max_position_embeddings`, or, where the rotary scaling stretches beyond it, as far as that
    reaches. Dynamic and linear scaling stretch the written length, YaRN the trained one."""
    written = hf.size("max_position_embeddings", default)
    scaling = None if rope is None else rope.scaling
    if scaling is None or scaling.kind in ("llama3", "longrope"):
        return written
    if scaling.kind == "yarn":
        return max(written, int(scaling.original_max_position * scaling.factor))
    return int(written * scaling.factor) if scaling.kind == "dynamic" else written


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
