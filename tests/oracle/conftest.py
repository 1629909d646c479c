"""Small checkpoints of every family, made by transformers, and what runs them.

Every parameter is drawn anew before saving: fresh initialisation (norms of one, biases of zero) hides what a model
does with them. Sizes are small, and the soft caps, eps and windows such that each of them changes the logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from paceline.config import DecoderConfig
from paceline.inputs import KVLayer, ModelInputs
from paceline.kernels.attention_plan import build_attention
from paceline.models.decoder import Decoder
from paceline.models.load import load_decoder
from paceline.models.registry import read_decoder_config

VOCAB = 96
BLOCK_SIZE = 4
WINDOW = 6

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 0.03,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.2, 1.5],
    "long_factor": [1.5, 4.0, 9.0],
    "partial_rotary_factor": 0.5,
}
GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": WINDOW,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}

MOE = {"moe_intermediate_size": 40, "num_experts": 5, "num_experts_per_tok": 2}

# name -> (transformers' config class, its arguments)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama-mqa": ("LlamaConfig", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-head-dim": ("LlamaConfig", {"head_dim": 16}),
    "llama-bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("LlamaConfig", {"head_dim": 16, "rope_parameters": {"rope_theta": 500.0, **LLAMA3}}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}}),
    "llama-gelu": ("LlamaConfig", {"hidden_act": "gelu"}),
    "llama-yarn": ("LlamaConfig", {"head_dim": 16, "rope_parameters": YARN}),
    "llama-yarn-exact": (
        "LlamaConfig",
        {"head_dim": 16, "rope_parameters": {**YARN, "truncate": False, "attention_factor": 1.4}},
    ),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3-bias": ("Qwen3Config", {"head_dim": 16, "attention_bias": True}),
    "gemma2": (
        "Gemma2Config",
        {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "num_hidden_layers": 4},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **GEMMA,
            "sliding_window_pattern": 3,
            "num_hidden_layers": 4,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", {"sliding_window": WINDOW}),
    "mistral-head-dim": ("MistralConfig", {"sliding_window": None, "head_dim": 16}),
    "ministral": (
        "MinistralConfig",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5}),
    "mixtral-window": ("MixtralConfig", {"num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": WINDOW}),
    "qwen3-moe": ("Qwen3MoeConfig", {**MOE, "head_dim": 16}),
    "qwen3-moe-mixed": (
        "Qwen3MoeConfig",
        {**MOE, "norm_topk_prob": True, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    ),
    "qwen3-moe-window": ("Qwen3MoeConfig", {**MOE, "use_sliding_window": True, "sliding_window": WINDOW}),
    "phi3": ("Phi3Config", {}),
    "phi3-window": ("Phi3Config", {"sliding_window": WINDOW, "tie_word_embeddings": True}),
    "phi3-longrope": ("Phi3Config", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1], "attention_bias": True, "mlp_bias": True}),
    "smollm3-window": (
        "SmolLM3Config",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": WINDOW},
    ),
    "olmo2": ("Olmo2Config", {"attention_bias": True}),
    "olmo3": (
        "Olmo3Config",
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "granite": (
        "GraniteConfig",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 4.0,
        },
    ),
    "granite-bias": ("GraniteConfig", {"attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.4}),
    "stablelm": ("StableLmConfig", {"hidden_size": 64, "layer_norm_eps": 0.03, "use_qkv_bias": True}),
    "stablelm-parallel": (
        "StableLmConfig",
        {"layer_norm_eps": 0.03, "use_parallel_residual": True, "partial_rotary_factor": 0.5},
    ),
}

# Multimodal models, of which the text part is read. Their vision is as small as they allow.
SIGLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = {**SIGLIP, "image_size": 16, "patch_size": 8}
PATCHES = {"depth": 1, "num_heads": 2, "patch_size": 4}
MROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 2, 2]}
TEXT = {k: v for k, v in SIZES.items() if k != "pad_token_id"}
VARIANTS |= {
    "gemma3-vision": (
        "Gemma3Config",
        {
            "text_config": {**TEXT, **GEMMA, "num_hidden_layers": 6},
            "vision_config": {"model_type": "siglip_vision_model", **IMAGE},
            "mm_tokens_per_image": 4,
        },
    ),
    "llava-llama": (
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **IMAGE},
        },
    ),
    "llava-mistral-tied": (
        "LlavaConfig",
        {
            "text_config": {"model_type": "mistral", **TEXT, "sliding_window": WINDOW, "tie_word_embeddings": True},
            "vision_config": {"model_type": "clip_vision_model", **IMAGE},
        },
    ),
    "mistral3": (
        "Mistral3Config",
        {
            "text_config": {"model_type": "mistral", **TEXT, "head_dim": 16, "sliding_window": None},
            "vision_config": {"model_type": "pixtral", "head_dim": 8, **IMAGE},
        },
    ),
    "qwen2-vl": (
        "Qwen2VLConfig",
        {
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {**PATCHES, "embed_dim": 16, "hidden_size": 48, "mlp_ratio": 1},
        },
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": {
                **TEXT,
                "rope_parameters": MROPE,
                "use_sliding_window": True,
                "sliding_window": WINDOW,
                "max_window_layers": 1,
            },
            "vision_config": {
                **PATCHES,
                "hidden_size": 16,
                "out_hidden_size": 48,
                "intermediate_size": 16,
                "fullatt_block_indexes": [0],
            },
        },
    ),
    "qwen3-vl": (
        "Qwen3VLConfig",
        {
            "text_config": {**TEXT, "head_dim": 12, "rope_parameters": MROPE},
            "vision_config": {
                **PATCHES,
                "hidden_size": 16,
                "out_hidden_size": 48,
                "intermediate_size": 16,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            "tie_word_embeddings": True,
        },
    ),
}

# Models run past the length that their rotary embedding was trained for. Their factors are fixed for prompts of
# LONG_CONTEXT tokens; transformers moves them with the prompt's length, so the two agree at that length alone.
LONG_CONTEXT = 23
LONG_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-dynamic-long": (
        "LlamaConfig",
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "phi3-longrope-long": ("Phi3Config", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
}

# Families that are not Llama's kin: layer norms, plain MLPs, learned positions or ALiBi.
LAYER_NORM = {"layer_norm_epsilon": 0.03}
NEOX = {"layer_norm_eps": 0.03, "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}}
FALCON40 = {"new_decoder_architecture": True, "num_kv_heads": 2, **LAYER_NORM}
FALCON_RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False, **LAYER_NORM}
STARCODER2 = {"norm_epsilon": 0.03, "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}}
VARIANTS |= {
    "gpt2": ("GPT2Config", LAYER_NORM),
    "gpt2-inner": (
        "GPT2Config",
        {**LAYER_NORM, "n_inner": 80, "activation_function": "relu", "tie_word_embeddings": False},
    ),
    "gpt-bigcode": ("GPTBigCodeConfig", LAYER_NORM),
    "gpt-bigcode-mha": ("GPTBigCodeConfig", {**LAYER_NORM, "multi_query": False}),
    "gpt-neox": ("GPTNeoXConfig", NEOX),
    "gpt-neox-sequential": ("GPTNeoXConfig", {**NEOX, "use_parallel_residual": False, "hidden_act": "gelu_fast"}),
    "gpt-neox-no-bias": ("GPTNeoXConfig", {**NEOX, "attention_bias": False, "tie_word_embeddings": True}),
    "opt": ("OPTConfig", {"ffn_dim": 80}),
    "opt-no-bias": ("OPTConfig", {"ffn_dim": 80, "enable_bias": False, "activation_function": "gelu"}),
    "falcon-7b": ("FalconConfig", LAYER_NORM),
    "falcon-40b": ("FalconConfig", FALCON40),
    "falcon-11b": (
        "FalconConfig",
        {**FALCON40, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 80, "tie_word_embeddings": False},
    ),
    "falcon-rw": ("FalconConfig", FALCON_RW),
    "falcon-alibi-mqa": ("FalconConfig", {"alibi": True, **LAYER_NORM}),
    "bloom": ("BloomConfig", LAYER_NORM),
    "bloom-six-heads": ("BloomConfig", {**LAYER_NORM, "n_head": 6}),  # slopes that are no single geometric series
    "mpt": ("MptConfig", LAYER_NORM),
    "mpt-scale": (
        "MptConfig",
        {**LAYER_NORM, "n_heads": 3, "attn_config": {"softmax_scale": 0.4}},
    ),
    "starcoder2": ("Starcoder2Config", STARCODER2),
    "starcoder2-window": ("Starcoder2Config", {**STARCODER2, "sliding_window": WINDOW, "use_bias": False}),
}

# transformers' eager Falcon adds ALiBi twice, in the mask and to the scores; its default, SDPA, adds it once.
THROUGH_SDPA = {"falcon-rw", "falcon-alibi-mqa"}


class SafetensorsFile:
    """A checkpoint as load_decoder and the reference take it: names, shapes and tensors of one safetensors file."""

    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        with safe_open(directory / "model.safetensors", "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def span(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class TinyModel:
    """`hf`: the transformers model, float32, with eager attention but for THROUGH_SDPA. `directory`: what its
    save_pretrained wrote."""

    name: str
    hf: Any
    directory: Path
    checkpoint: SafetensorsFile
    config: DecoderConfig

    def hf_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[T, V] float32."""
        with torch.inference_mode():
            logits_TV: torch.Tensor = self.hf(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
        return logits_TV.clone()

    def decoder(self, dtype: torch.dtype = torch.float32, quantize: str | None = None, device: str = "cpu") -> Decoder:
        return load_decoder(self.checkpoint, self.config, dtype=dtype, quantize=quantize, device=device)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices of 48 columns gain nothing from a second thread, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter anew: matrices at 1.5 / sqrt(columns), vectors around what initialisation gives them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:  # three: the matrices of all experts in one
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(noise * 0.3)


@pytest.fixture(scope="session")
def redraw() -> Callable[[torch.nn.Module, int], None]:
    return randomise


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """`tiny_model(name)`: the small checkpoint of a name in VARIANTS or LONG_VARIANTS, made once a session."""
    import transformers

    made: dict[str, TinyModel] = {}

    def make(name: str) -> TinyModel:
        if name not in made:
            config_class, arguments = VARIANTS.get(name) or LONG_VARIANTS[name]
            kind, vision = getattr(transformers, config_class), "vision_config" in arguments
            sizes = {} if vision else {key: value for key, value in SIZES.items() if hasattr(kind(), key)}
            hf_config = kind(**{**sizes, **deepcopy(arguments)})  # which fills them in
            auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
            implementation = "sdpa" if name in THROUGH_SDPA else "eager"
            hf = auto.from_config(hf_config, attn_implementation=implementation).eval()
            randomise(hf, seed=len(name) + sum(map(ord, name)))
            directory = tmp_path_factory.mktemp(name)
            hf.save_pretrained(directory)
            checkpoint = SafetensorsFile(directory)
            config = read_decoder_config(checkpoint.config)
            if name in LONG_VARIANTS:
                config = config.with_context(LONG_CONTEXT)
            made[name] = TinyModel(name, hf, directory, checkpoint, config)
        return made[name]

    return make


@pytest.fixture(params=VARIANTS)
def each_model(request: pytest.FixtureRequest, tiny_model: Callable[[str], TinyModel]) -> TinyModel:
    """Every variant in turn."""
    return tiny_model(request.param)


class Pages:
    """Sequences of different lengths in one paged cache, run through a Decoder step by step.

    Blocks are dealt in a shuffled order, the cache starts full of stale numbers, and blocks that a window has left
    behind are given back (0, the null block, stands in their place): a wrong slot shows in the logits.
    """

    def __init__(self, decoder: Decoder, sequences: Sequence[Sequence[int]]) -> None:
        self.decoder = decoder
        self.sequences = sequences
        self.done = [0] * len(sequences)
        self.logits: list[list[torch.Tensor]] = [[] for _ in sequences]
        self.groups = decoder.kv_groups
        generator = torch.Generator().manual_seed(0)
        counts = [-(-len(sequence) // BLOCK_SIZE) for sequence in sequences]
        self.tables: list[list[list[int]]] = []
        for _ in self.groups:
            blocks = iter((torch.randperm(sum(counts), generator=generator) + 1).tolist())
            self.tables.append([[next(blocks) for _ in range(count)] for count in counts])
        self.kv = []
        group_of = {layer: g for g, group in enumerate(self.groups) for layer in group.layers}
        for _, g in sorted(group_of.items()):
            group = self.groups[g]
            shape = (2, group.num_kv_heads, (sum(counts) + 1) * BLOCK_SIZE, group.head_dim)
            stale = torch.randn(shape, generator=generator) * 100
            k_HSD, v_HSD = stale.to(decoder.device, decoder.dtype)
            self.kv.append(KVLayer(k_HSD, v_HSD, g))

    def step(self, counts: Sequence[int]) -> None:
        """Run the next counts[r] tokens of every sequence r in one forward pass."""
        rows = [r for r, count in enumerate(counts) if count]
        starts, tokens, positions = [0], [], []
        for r in rows:
            first, end = self.done[r], self.done[r] + counts[r]
            tokens += self.sequences[r][first:end]
            positions += range(first, end)
            starts.append(len(tokens))
        tables = [
            [self._visible(self.tables[g][r], self.done[r], group.window) for r in rows]
            for g, group in enumerate(self.groups)
        ]
        attention = build_attention(
            starts,
            [self.done[r] + counts[r] for r in rows],
            tables,
            [group.window for group in self.groups],
            block_size=BLOCK_SIZE,
            device=self.decoder.device,
        )
        device = self.decoder.device
        inputs = ModelInputs(torch.tensor(tokens, device=device), torch.tensor(positions, device=device), attention)
        with torch.inference_mode():
            logits_TV = self.decoder.logits(self.decoder(inputs, self.kv))
        for i, r in enumerate(rows):
            self.logits[r].append(logits_TV[starts[i] : starts[i + 1]])
            self.done[r] += counts[r]

    @staticmethod
    def _visible(table: list[int], position: int, window: int | None) -> list[int]:
        left_behind = 0 if window is None else max(0, position - window + 1) // BLOCK_SIZE
        return [0] * left_behind + table[left_behind:]

    def run(self, chunk: int | None = None) -> list[torch.Tensor]:
        """All sequences to their ends, at most `chunk` tokens of each a step. Logits [T, V] of each."""
        while any(done < len(sequence) for done, sequence in zip(self.done, self.sequences, strict=True)):
            left = [len(sequence) - done for done, sequence in zip(self.done, self.sequences, strict=True)]
            self.step([n if chunk is None else min(n, chunk) for n in left])
        return [torch.cat(parts) for parts in self.logits]


@pytest.fixture(scope="session")
def pages() -> type[Pages]:
    return Pages


@pytest.fixture(scope="session")
def relative_error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """The largest difference, relative to the largest expected magnitude; infinite for a NaN."""

    def measure(found: torch.Tensor, expected: torch.Tensor) -> float:
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        return error if error == error else float("inf")

    return measure


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Uneven lengths: one token, shorter than a window, a block's border, and longer than two windows."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in (1, 5, 8, 23)]
