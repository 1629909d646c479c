"""The one memory formula: what a model's weights, its cache and a step's activations take, in bytes.

What is told before loading and what the engine then allocates come from here, so that they cannot differ.
No torch: sizes follow from the configuration alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.config import DecoderConfig, KVGroup

GIB = 1 << 30


@dataclass(frozen=True)
class WeightCount:
    """Values of a decoder by how they are stored: `linear` in the weight format, the rest in the model's dtype."""

    linear: int
    head: int  # the output head, tied or not
    embedding: int
    small: int  # norms and biases


def count_weights(config: DecoderConfig) -> WeightCount:
    """How many values a decoder has; a tied head is counted beside the embedding it repeats."""
    a, hidden, inner = config.attention, config.hidden_size, config.mlp.intermediate_size
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    linear = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * inner
    small = (q + 2 * kv) * a.qkv_bias + hidden * a.out_bias + 2 * a.head_dim * a.qk_norm
    small += (2 * inner + hidden) * config.mlp.bias + hidden * (4 if config.residual.post_norms else 2)
    table = config.vocab_size * hidden
    return WeightCount(config.num_layers * linear, table, table, config.num_layers * small + hidden)


def weight_bytes(
    config: DecoderConfig, bytes_per_value: int, *, bytes_per_linear: float, tied_head_shares: bool
) -> int:
    """Bytes resident after loading. `tied_head_shares`: a tied head is the embedding's own memory, not a copy."""
    count = count_weights(config)
    head = 0 if config.tie_embeddings and tied_head_shares else count.head
    return int((count.linear + head) * bytes_per_linear + (count.embedding + count.small) * bytes_per_value)


def step_weight_bytes(config: DecoderConfig, bytes_per_value: int, *, bytes_per_linear: float) -> int:
    """Bytes of weights that one decode step reads: everything but the embedding table, of which it reads rows."""
    count = count_weights(config)
    return int((count.linear + count.head) * bytes_per_linear + count.small * bytes_per_value)


def kv_bytes_per_token(config: DecoderConfig, group: KVGroup, bytes_per_value: int) -> int:
    """Keys and values of one token in all the group's layers."""
    return 2 * len(group.layers) * config.attention.num_kv_heads * config.attention.head_dim * bytes_per_value


def activation_bytes(config: DecoderConfig, num_tokens: int, num_rows: int, bytes_per_value: int) -> int:
    """The most that a step of `num_tokens` tokens, `num_rows` of which are sampled, holds at once: the residual
    stream, the widest layer's input and output, and float32 logits with their sampling copies."""
    a = config.attention
    qkv = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
    widest = max(qkv + a.num_heads * a.head_dim, 3 * config.mlp.intermediate_size)
    return num_tokens * (2 * config.hidden_size + widest) * bytes_per_value + 3 * num_rows * config.vocab_size * 4


@dataclass(frozen=True)
class CachePlan:
    """Blocks of each KV group (the null block not counted) and the bytes of all of them, null blocks included."""

    num_blocks: tuple[int, ...]
    nbytes: int
    block_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens that the smallest full-context group holds; a window group alone holds more context than tokens."""
        return self.num_blocks[0] * self.block_size


def plan_cache(
    config: DecoderConfig,
    *,
    block_size: int,
    bytes_per_value: int,
    budget_bytes: int,
    max_model_len: int,
    max_num_seqs: int,
    step_tokens: int,
) -> CachePlan:
    """The largest cache within `budget_bytes` that requests can use: at most `max_num_seqs` contexts of
    `max_model_len`. A window group needs no more than each request's window and the tokens of one step."""
    groups = config.kv_groups

    def blocks_for(tokens: int) -> tuple[int, ...]:
        counts = []
        for group in groups:
            need = tokens
            if group.window is not None:  # two blocks a request for the unaligned ends of its window
                need = min(tokens, max_num_seqs * (group.window + 2 * block_size) + step_tokens)
            counts.append(max(1, -(-need // block_size)))
        return tuple(counts)

    low, high = block_size, max_num_seqs * -(-max_model_len // block_size) * block_size
    if cache_bytes(config, blocks_for(high), block_size, bytes_per_value) > budget_bytes:
        while high - low > block_size:  # the largest whole number of blocks that fits
            middle = (low + high) // 2 // block_size * block_size
            fits = cache_bytes(config, blocks_for(middle), block_size, bytes_per_value) <= budget_bytes
            low, high = (middle, high) if fits else (low, middle)
        high = low
    counts = blocks_for(high)
    return CachePlan(counts, cache_bytes(config, counts, block_size, bytes_per_value), block_size)


def cache_bytes(config: DecoderConfig, num_blocks: Sequence[int], block_size: int, bytes_per_value: int) -> int:
    """Bytes of a cache of so many blocks a group, each group's null block included."""
    return sum(
        (count + 1) * block_size * kv_bytes_per_token(config, group, bytes_per_value)
        for group, count in zip(config.kv_groups, num_blocks, strict=True)
    )


def gib(nbytes: float) -> str:
    """'1.23 GiB'."""
    return f"{nbytes / GIB:.2f} GiB"
