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
from paceline.kernels.alibi import alibi_slopes
from paceline.layers.rotary import inverse_frequencies
from paceline.loading.rules import stored_names
from paceline.models.load import Tensors, names_in_file
from paceline.models.registry import family_of

Choose = Callable[[torch.Tensor, Sequence[int]], int]
"""(logits_V, tokens so far) -> the next token."""


@dataclass(frozen=True)
class Reference:
    """A model: its config, and its tensors by our names."""

    config: DecoderConfig
    tensors: Mapping[str, torch.Tensor]


@dataclass
class Cache:
    """Every layer's keys and values so far, [L, K, E]."""

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    length: int = 0


def load(checkpoint: Tensors, config: DecoderConfig) -> Reference:
    family, experts = family_of(config), 0 if config.moe is None else config.moe.num_experts
    stored = stored_names(family.weight_rules(config), config.num_layers, experts)
    wanted = {name for where in stored.values() for name in where.names}
    files = names_in_file(wanted, checkpoint.names(), family.prefix)
    tensors = {
        ours: torch.cat([where.layout.ours(checkpoint.read(files[name]).float()) for name in where.names])
        for ours, where in stored.items()
    }
    return Reference(config, tensors)


def forward(model: Reference, token_ids: Sequence[int], cache: Cache) -> torch.Tensor:
    """The logits after each of `token_ids`, which continue what `cache` holds: [T, V]. The cache grows by them."""
    config, r = model.config, model.config.residual
    positions_T = torch.arange(cache.length, cache.length + len(token_ids))
    x_TD = model.tensors["embedding.weight"][torch.tensor(token_ids)] * config.embedding_scale
    if config.learned_position_offset is not None:
        x_TD = x_TD + model.tensors["positions.weight"][positions_T + config.learned_position_offset]
    if config.embedding_norm:
        x_TD = norm(model, "embedding_norm", x_TD)
    for layer in range(config.num_layers):
        name = f"blocks.{layer}"
        normed_TD = norm(model, f"{name}.attention_norm", x_TD) if r.pre_norms else x_TD
        attended_TD = attention(model, layer, normed_TD, positions_T, cache)
        if r.post_norms:
            attended_TD = norm(model, f"{name}.post_attention_norm", attended_TD)
        after_TD = x_TD + r.multiplier * attended_TD
        mlp_in_TD = x_TD if r.parallel else after_TD
        if r.shared_norm:
            mlp_in_TD = normed_TD
        elif r.pre_norms:
            mlp_in_TD = norm(model, f"{name}.mlp_norm", mlp_in_TD)
        mixed_TD = experts(model, layer, mlp_in_TD) if config.is_moe(layer) else mlp(model, f"{name}.mlp", mlp_in_TD)
        if r.post_norms:
            mixed_TD = norm(model, f"{name}.post_mlp_norm", mixed_TD)
        x_TD = after_TD + r.multiplier * mixed_TD
    cache.length += len(token_ids)
    head_VD = model.tensors["embedding.weight" if config.tie_embeddings else "head.weight"]
    return soft_cap(norm(model, "norm", x_TD) @ head_VD.T * config.logit_scale, config.logit_soft_cap)


def attention(
    model: Reference, layer: int, x_TD: torch.Tensor, positions_T: torch.Tensor, cache: Cache
) -> torch.Tensor:
    config, name = model.config, f"blocks.{layer}.attention"
    a, rope = config.attention, config.rope_of(layer)
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    q_TF, k_TF, v_TF = torch.split(linear(model, f"{name}.qkv", x_TD), [queries, keys, keys], dim=1)
    if a.qk_norm == "projection":
        q_TF, k_TF = norm(model, f"{name}.q_norm", q_TF), norm(model, f"{name}.k_norm", k_TF)
    q_THE = q_TF.view(-1, a.num_heads, a.head_dim)
    k_TKE = k_TF.view(-1, a.num_kv_heads, a.head_dim)
    v_TKE = v_TF.view(-1, a.num_kv_heads, a.head_dim)
    if a.qk_norm == "head":
        q_THE, k_TKE = norm(model, f"{name}.q_norm", q_THE), norm(model, f"{name}.k_norm", k_TKE)
    if rope is not None:
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
        if a.alibi is not None:
            scores_TL = scores_TL - alibi_slopes(a.num_heads)[head] * a.alibi * distance_TL
        weights_TL = scores_TL.masked_fill(hidden_TL, float("-inf")).softmax(dim=1)
        heads.append(weights_TL @ v_LKE[:, kv_head])
    return linear(model, f"{name}.out", torch.cat(heads, dim=1))


def mlp(model: Reference, name: str, x_TD: torch.Tensor) -> torch.Tensor:
    config = model.config.mlp
    if config.gated:
        gate_TF, up_TF = linear(model, f"{name}.gate_up", x_TD).chunk(2, dim=1)
        return linear(model, f"{name}.down", activation(gate_TF, config.activation) * up_TF)
    return linear(model, f"{name}.down", activation(linear(model, f"{name}.up", x_TD), config.activation))


def experts(model: Reference, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
    """Each token through its experts, one token and one expert at a time."""
    moe, name = model.config.moe, f"blocks.{layer}.mlp"
    assert moe is not None
    rows = []
    for x_D in x_TD:
        probs_E = linear(model, f"{name}.router", x_D).softmax(dim=0)
        chosen = probs_E.argsort(descending=True)[: moe.experts_per_token]
        total = probs_E[chosen].sum() if moe.normalize else 1.0
        answers = [probs_E[e] / total * mlp(model, f"{name}.experts.{e}", x_D[None])[0] for e in chosen]
        rows.append(torch.stack(answers).sum(dim=0))
    return torch.stack(rows)


def activation(x: torch.Tensor, name: str) -> torch.Tensor:
    functional = torch.nn.functional
    match name:
        case "silu":
            return functional.silu(x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case _:
            return functional.relu(x)


def linear(model: Reference, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ model.tensors[f"{name}.weight"].T + model.tensors.get(f"{name}.bias", torch.zeros(()))


def norm(model: Reference, name: str, x: torch.Tensor) -> torch.Tensor:
    """Root mean square norm, or layer norm with its optional bias."""
    config, weight = model.config.norm, model.tensors[f"{name}.weight"]
    if config.kind == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    normed = x / (x.square().mean(dim=-1, keepdim=True) + config.eps).sqrt()
    return normed * (1 + weight if config.unit_offset else weight) + model.tensors.get(f"{name}.bias", torch.zeros(()))


def rotate(x_TNE: torch.Tensor, positions_T: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Turn the plane (i, i + dim/2) of every head by position * frequency_i; dimensions past `rope.dim` stay."""
    angles_TF = positions_T[:, None].float() * inverse_frequencies(rope)
    length = 1.0 if rope.scaling is None else rope.scaling.attention_factor
    cos, sin = angles_TF.cos()[:, None] * length, angles_TF.sin()[:, None] * length
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
