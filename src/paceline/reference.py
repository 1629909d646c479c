"""The executable specification: what a decoder computes, written to be read first. The tests' oracle.

No paging, no batching, no fusion, no cleverness: float32, one sequence, keys and values in plain tensors. It shares
with the engine the DecoderConfig, the checkpoint's names and the rotary frequencies, and no line of the forward pass;
so where both agree with each other and with Hugging Face transformers, they are right.

    model = load(checkpoint, read_decoder_config(checkpoint.config))
    tokens = generate(model, prompt_token_ids, max_tokens=64)

Shapes: T new tokens, L tokens so far (the new ones included), D hidden size, H query heads, K key/value heads, E head
dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from paceline.config import DecoderConfig, RopeConfig
from paceline.layers.rotary import inverse_frequencies
from paceline.loading.rules import forward_names
from paceline.models.load import Tensors
from paceline.models.registry import family_of

Choose = Callable[[torch.Tensor, Sequence[int]], int]
"""(logits_V, tokens so far) -> the next token."""


@dataclass(frozen=True)
class Reference:
    """A model: its config, and by our names the tensors of the checkpoint, un-fused (qkv is three)."""

    config: DecoderConfig
    tensors: Mapping[str, tuple[torch.Tensor, ...]]


@dataclass
class Cache:
    """Every layer's keys and values so far, [L, K, E]."""

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    length: int = 0


def load(checkpoint: Tensors, config: DecoderConfig) -> Reference:
    names = forward_names(family_of(config).weight_rules(config), config.num_layers)
    tensors = {ours: tuple(checkpoint.read(name).float() for name in theirs) for ours, theirs in names.items()}
    return Reference(config, tensors)


def forward(model: Reference, token_ids: Sequence[int], cache: Cache) -> torch.Tensor:
    """The logits after each of `token_ids`, which continue what `cache` holds: [T, V]. The cache grows by them."""
    config = model.config
    (table_VD,) = model.tensors["embedding.weight"]
    x_TD = table_VD[torch.tensor(token_ids)] * config.embedding_scale
    positions_T = torch.arange(cache.length, cache.length + len(token_ids))
    for layer in range(config.num_layers):
        name = f"blocks.{layer}"
        attended_TD = attention(model, layer, rms_norm(model, f"{name}.attention_norm", x_TD), positions_T, cache)
        if config.residual.post_norms:
            attended_TD = rms_norm(model, f"{name}.post_attention_norm", attended_TD)
        x_TD = x_TD + attended_TD
        mlp_TD = mlp(model, layer, rms_norm(model, f"{name}.mlp_norm", x_TD))
        if config.residual.post_norms:
            mlp_TD = rms_norm(model, f"{name}.post_mlp_norm", mlp_TD)
        x_TD = x_TD + mlp_TD
    cache.length += len(token_ids)
    (head_VD,) = model.tensors["embedding.weight" if config.tie_embeddings else "head.weight"]
    return soft_cap(rms_norm(model, "norm", x_TD) @ head_VD.T, config.logit_soft_cap)


def attention(
    model: Reference, layer: int, x_TD: torch.Tensor, positions_T: torch.Tensor, cache: Cache
) -> torch.Tensor:
    config, name = model.config, f"blocks.{layer}.attention"
    a, rope = config.attention, config.rope_of(layer)
    q_TF, k_TF, v_TF = linear(model, f"{name}.qkv", x_TD)
    q_THE = q_TF.view(-1, a.num_heads, a.head_dim)
    k_TKE = k_TF.view(-1, a.num_kv_heads, a.head_dim)
    v_TKE = v_TF.view(-1, a.num_kv_heads, a.head_dim)
    if a.qk_norm:
        q_THE, k_TKE = rms_norm(model, f"{name}.q_norm", q_THE), rms_norm(model, f"{name}.k_norm", k_TKE)
    q_THE, k_TKE = rotate(q_THE, positions_T, rope), rotate(k_TKE, positions_T, rope)

    k_LKE = cache.keys[layer] = torch.cat((cache.keys.get(layer, k_TKE[:0]), k_TKE))
    v_LKE = cache.values[layer] = torch.cat((cache.values.get(layer, v_TKE[:0]), v_TKE))
    distance_TL = positions_T[:, None] - torch.arange(len(k_LKE))[None, :]
    hidden_TL = distance_TL < 0
    window = config.window(layer)
    if window is not None:
        hidden_TL = hidden_TL | (distance_TL >= window)

    heads = []
    for head in range(a.num_heads):
        kv_head = head // (a.num_heads // a.num_kv_heads)
        scores_TL = soft_cap(q_THE[:, head] @ k_LKE[:, kv_head].T * a.scale, a.soft_cap)
        weights_TL = scores_TL.masked_fill(hidden_TL, float("-inf")).softmax(dim=1)
        heads.append(weights_TL @ v_LKE[:, kv_head])
    (out_TD,) = linear(model, f"{name}.out", torch.cat(heads, dim=1))
    return out_TD


def mlp(model: Reference, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
    gate, up = linear(model, f"blocks.{layer}.mlp.gate_up", x_TD)
    functional = torch.nn.functional
    match model.config.mlp.activation:
        case "silu":
            gate = functional.silu(gate)
        case "gelu":
            gate = functional.gelu(gate)
        case "gelu_tanh":
            gate = functional.gelu(gate, approximate="tanh")
    (out_TD,) = linear(model, f"blocks.{layer}.mlp.down", gate * up)
    return out_TD


def linear(model: Reference, name: str, x: torch.Tensor) -> list[torch.Tensor]:
    """x w^T + b, for each of the tensors that the engine fuses under `name`."""
    weights = model.tensors[f"{name}.weight"]
    biases = model.tensors.get(f"{name}.bias", (torch.zeros(()),) * len(weights))
    return [x @ weight.T + bias for weight, bias in zip(weights, biases, strict=True)]


def rms_norm(model: Reference, name: str, x: torch.Tensor) -> torch.Tensor:
    (weight,) = model.tensors[f"{name}.weight"]
    norm = model.config.norm
    normed = x / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    return normed * (1 + weight if norm.unit_offset else weight)


def rotate(x_TNE: torch.Tensor, positions_T: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Turn the plane (i, i + dim/2) of every head by position * frequency_i; dimensions past `rope.dim` stay."""
    angles_TF = positions_T[:, None].float() * inverse_frequencies(rope)
    cos, sin = angles_TF.cos()[:, None], angles_TF.sin()[:, None]
    half = rope.dim // 2
    first, second, rest = x_TNE[:, :, :half], x_TNE[:, :, half : rope.dim], x_TNE[:, :, rope.dim :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=2)


def soft_cap(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def greedy(logits_V: torch.Tensor, tokens: Sequence[int]) -> int:
    return int(logits_V.argmax())


def generate(
    model: Reference,
    prompt: Sequence[int],
    max_tokens: int,
    choose: Choose = greedy,
    stop: frozenset[int] = frozenset(),
) -> list[int]:
    """Up to `max_tokens` tokens after `prompt`, ending with the first that is in `stop`."""
    tokens, cache = list(prompt), Cache()
    logits_V = forward(model, prompt, cache)[-1]
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(choose(logits_V, tokens))
        if tokens[-1] in stop:
            break
        logits_V = forward(model, tokens[-1:], cache)[-1]
    return tokens[len(prompt) :]
