"""What a model is and how the engine runs it: frozen value objects, validated once, no torch.

A DecoderConfig is data: a family (models/families) maps a Hugging Face `config.json` to it and the one
decoder (models/decoder.py) executes it. EngineConfig and its parts are what a user sets.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from paceline.errors import UsageError

# ---------------------------------------------------------------------------------------------- the model


RopeKind = Literal["linear", "dynamic", "yarn", "llama3", "longrope"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched past the `original_max_position` tokens they were trained for.

    "linear" divides all by `factor`; "dynamic" (NTK) raises the base as far as `context` needs; "yarn" (Peng et al.,
    2023) divides the slow ones and blends between `beta_fast` and `beta_slow` turns; "llama3" (Llama 3.1's rule) blends
    between wavelengths of original/high and original/low; "longrope" (Ding et al., 2024) divides each by its own
    factor: `long_factors` where `context` exceeds the original length, else `short_factors`.
    `attention_factor` multiplies cosines and sines, so its square multiplies the scores of the rotated part.
    `context` is fixed before the first key is cached (`DecoderConfig.with_context`): changing it later would move keys
    that are already there. None is the original length.
    """

    kind: RopeKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: round the ends of the blend outwards to whole dimensions
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    context: int | None = None


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al., 2021), half-split ("NeoX"), over the first `dim` elements of a head."""

    theta: float
    dim: int
    scaling: RopeScaling | None = None

    def with_context(self, max_model_len: int) -> RopeConfig:
        if self.scaling is None:
            return self
        return replace(self, scaling=replace(self.scaling, context=max_model_len))


@dataclass(frozen=True)
class AttentionConfig:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # multiplies q.k; 1/sqrt(head_dim) for most, query_pre_attn_scalar**-0.5 for Gemma
    qkv_bias: bool = False
    out_bias: bool = False
    # RMS norm of q and k before RoPE: over each head (Qwen3, Gemma 3) or over all heads at once (OLMo 2).
    qk_norm: Literal["head", "projection"] | None = None
    soft_cap: float | None = None  # cap * tanh(score / cap), Gemma 2
    # ALiBi (Press et al., 2022): a head's slope times the distance is taken from its scores. The slopes follow from
    # num_heads; this multiplies them (1 for BLOOM, `scale` for Falcon). None: no ALiBi.
    alibi: float | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}: "
                "config.json is inconsistent"
            )


@dataclass(frozen=True)
class MlpConfig:
    """`gated`: down(activation(gate(x)) * up(x)), else down(activation(up(x)))."""

    intermediate_size: int
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"] = "silu"
    bias: bool = False
    gated: bool = True


@dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts in place of the MLP of `layers`: each token goes to its `experts_per_token` likeliest of
    `num_experts`, whose answers are weighted by the router's softmax; `normalize`: the weights then sum to 1.

    An expert is gated, without biases, `intermediate_size` wide, with MlpConfig's activation.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    layers: tuple[int, ...]
    normalize: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise UsageError(
                f"{self.experts_per_token} active experts of {self.num_experts}: config.json must name at least one "
                "(num_experts_per_tok), and no more than there are"
            )


@dataclass(frozen=True)
class NormConfig:
    """`kind` "rms" (Zhang and Sennrich, 2019) or "layer" (Ba et al., 2016), which may have a bias.
    `unit_offset`: the stored weight is w and the norm multiplies by 1 + w (Gemma)."""

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    bias: bool = False
    unit_offset: bool = False


@dataclass(frozen=True)
class ResidualConfig:
    """How a layer's two halves join the residual stream.

    `pre_norms`: a norm before attention and before the MLP (all but OLMo 2). `post_norms`: a norm after each, before
    the add (OLMo 2; Gemma 2 and 3 have both). `parallel`: attention and MLP read the same stream and are added
    together (GPT-NeoX, Falcon); `shared_norm`: through one norm. `multiplier`: of each half's output (Granite).
    """

    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    shared_norm: bool = False
    multiplier: float = 1.0


@dataclass(frozen=True)
class KVGroup:
    """Layers that share one block table: all that see the whole context, or all that see the same window."""

    name: str
    layers: tuple[int, ...]
    window: int | None  # tokens a query sees, itself included; None sees all
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class DecoderConfig:
    """All that distinguishes one decoder-only transformer from another. Sizes in elements, lengths in tokens."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position: int
    attention: AttentionConfig
    rope: RopeConfig | None
    mlp: MlpConfig
    norm: NormConfig
    moe: MoeConfig | None = None
    residual: ResidualConfig = ResidualConfig()
    windows: tuple[int | None, ...] = ()  # a layer's sliding window, None for full; () means full everywhere
    window_rope: RopeConfig | None = None  # rotary of the windowed layers, where it differs (Gemma 3)
    no_rope_layers: tuple[int, ...] = ()  # layers without any position embedding (SmolLM3)
    # A learned vector a position is added to the embeddings; position p is row p + this (2 for OPT, 0 for GPT-2).
    learned_position_offset: int | None = None
    tie_embeddings: bool = False
    embedding_scale: float = 1.0
    embedding_norm: bool = False  # a norm right after the embedding (BLOOM)
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        if self.windows and len(self.windows) != self.num_layers:
            raise UsageError(
                f"{len(self.windows)} layer windows for {self.num_layers} layers: config.json is inconsistent"
            )
        if len({w for w in self.windows if w is not None}) > 1:
            raise UsageError("layers with sliding windows of different lengths are not supported")

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def rope_of(self, layer: int) -> RopeConfig | None:
        if layer in self.no_rope_layers:
            return None
        if self.window(layer) is not None and self.window_rope is not None:
            return self.window_rope
        return self.rope

    def is_moe(self, layer: int) -> bool:
        return self.moe is not None and layer in self.moe.layers

    def with_context(self, max_model_len: int) -> DecoderConfig:
        """The same model with its rotary scaling fixed for contexts of up to `max_model_len` tokens."""
        return replace(
            self,
            rope=self.rope and self.rope.with_context(max_model_len),
            window_rope=self.window_rope and self.window_rope.with_context(max_model_len),
        )

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """The full group first, then the window group; a group without layers is left out."""
        by_window: dict[int | None, list[int]] = {}
        for layer in range(self.num_layers):
            by_window.setdefault(self.window(layer), []).append(layer)
        ordered = sorted(by_window.items(), key=lambda item: item[0] is not None)
        a = self.attention
        return tuple(
            KVGroup("full" if window is None else "window", tuple(layers), window, a.num_kv_heads, a.head_dim)
            for window, layers in ordered
        )


# --------------------------------------------------------------------------------------------- the engine


Mode = Literal["auto", "eager", "graph", "compile"]
MODES: tuple[str, ...] = get_args(Mode)
# What options may say, known without torch.
STORED = ("int8", "int4", "fp8")  # ways of storing a weight
QUANTIZATIONS = (*STORED, "w8a8-fp8")  # formats.FORMATS without dense
STREAMED = ("dense", "int8", "fp8")  # formats that `offload` can stream: their rows can be cut anywhere
OFFLOADS = ("auto", "host", "disk")
MODEL_IMPLS = ("auto", "paceline", "transformers")  # vLLM's option and its spelling
LOAD_FORMATS = ("auto", "dummy")  # the same


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise UsageError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")


@dataclass(frozen=True)
class CacheConfig:
    """`num_blocks`: blocks a KV group, the null block not counted; None lets sizing.py choose from memory."""

    block_size: int = 16
    num_blocks: int | None = None
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise UsageError(f"block_size must be at least 1, got {self.block_size}")
        if self.num_blocks is not None and self.num_blocks < 1:
            raise UsageError(f"num_blocks must be at least 1, got {self.num_blocks}")


@dataclass(frozen=True)
class SchedulerConfig:
    """`max_num_batched_tokens` is the token budget of one step, prefill chunks, decodes and drafts together (see
    engine/open_step.py for what prompts get of it).
    `max_chunk`: the longest prefill chunk of one request, None for the whole budget."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_chunk: int | None = None
    policy: Literal["fcfs", "priority"] = "fcfs"

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise UsageError(f"max_num_seqs must be at least 1, got {self.max_num_seqs}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running request needs one token a step"
            )
        if self.max_chunk is not None and self.max_chunk < 1:
            raise UsageError(f"max_chunk must be at least 1, got {self.max_chunk}")
        if self.policy not in ("fcfs", "priority"):
            raise UsageError(f"policy must be 'fcfs' or 'priority', got {self.policy!r}")


@dataclass(frozen=True)
class ParallelConfig:
    """Over how many devices a model is split: each matrix over `tensor` of them, the layers over `pipeline` groups of
    so many (vLLM's tensor_parallel_size and pipeline_parallel_size)."""

    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}_parallel_size must be at least 1, got {getattr(self, name)}")

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline


@dataclass(frozen=True)
class SpeculativeConfig:
    """n-gram prompt lookup: the longest suffix of `prompt_lookup_min..max` tokens seen before proposes the next."""

    method: Literal["ngram"] = "ngram"
    num_speculative_tokens: int = 4
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 4

    def __post_init__(self) -> None:
        if self.method != "ngram":
            raise UsageError(f"unknown speculative method {self.method!r}; known: 'ngram'")
        if self.num_speculative_tokens < 1:
            raise UsageError(f"num_speculative_tokens must be at least 1, got {self.num_speculative_tokens}")
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise UsageError(
                "need 1 <= prompt_lookup_min <= prompt_lookup_max, "
                f"got {self.prompt_lookup_min} and {self.prompt_lookup_max}"
            )


@dataclass(frozen=True)
class EngineConfig:
    """How a loaded model is run. `async_depth`: how many steps schedule() may run ahead of update(). `mode`: "graph"
    captures decode steps in CUDA graphs where it can, "eager" never, "auto" is "graph"; "compile" is "graph" with
    torch.compile for what no kernel of ours covers."""

    max_model_len: int
    seed: int = 0
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    speculative: SpeculativeConfig | None = None
    async_depth: int = 0
    mode: Mode = "auto"

    def __post_init__(self) -> None:
        check_mode(self.mode)
        if self.max_model_len < 1:
            raise UsageError(f"max_model_len must be at least 1, got {self.max_model_len}")
        if self.async_depth not in (0, 1, 2):
            raise UsageError(f"async_depth must be 0, 1 or 2, got {self.async_depth}")
