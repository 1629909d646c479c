"""The one memory formula: what a model's weights, its cache and a step's activations take, in bytes.

What is told before loading and what the engine then allocates come from here, so that they cannot differ.
No torch: sizes follow from the configuration alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.config import DecoderConfig, KVGroup

GIB = 1 << 30
LOGPROB_WORKSPACE = 64 << 20  # bytes that scoring a slice of rows takes: 27 rows of 152,000 tokens
LOGIT_BYTES = 16  # of one value while it is scored: the head's output, float32 logits, log softmax, a comparison
TOP_BYTES = 12  # of one returned value: float32 and its int64 index


@dataclass(frozen=True)
class WeightCount:
    """Values of a decoder by how they are stored: `linear` in the weight format, the rest in the model's dtype."""

    linear: int
    head: int  # the output head, tied or not
    embedding: int
    small: int  # norms, biases, routers and learned positions
    idle: int = 0  # of `linear`: experts that a single token does not visit


def count_weights(config: DecoderConfig) -> WeightCount:
    """How many values a decoder has; a tied head is counted beside the embedding it repeats."""
    a, hidden, norm = config.attention, config.hidden_size, _norm_values(config)
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    linear = config.num_layers * (hidden * (q + 2 * kv) + q * hidden)
    small = (q + 2 * kv) * a.qkv_bias + hidden * a.out_bias
    small += {None: 0, "head": 2 * a.head_dim, "projection": q + kv}[a.qk_norm]
    r = config.residual
    norms = (1 if r.shared_norm else 2) * r.pre_norms + 2 * r.post_norms
    small = config.num_layers * (small + norms * norm) + norm * (1 + config.embedding_norm)
    if config.learned_position_offset is not None:
        small += (config.max_position + config.learned_position_offset) * hidden

    m, moe_layers, idle = config.mlp, 0, 0
    if config.moe is not None:
        moe_layers, e = len(config.moe.layers), config.moe
        expert = 3 * hidden * e.intermediate_size
        linear += moe_layers * e.num_experts * expert
        idle = moe_layers * (e.num_experts - e.experts_per_token) * expert
        small += moe_layers * e.num_experts * hidden
    inputs = 2 if m.gated else 1
    linear += (config.num_layers - moe_layers) * (inputs + 1) * hidden * m.intermediate_size
    small += (config.num_layers - moe_layers) * (inputs * m.intermediate_size + hidden) * m.bias
    table = config.vocab_size * hidden
    return WeightCount(linear, table, table, small, idle)


def _norm_values(config: DecoderConfig) -> int:
    return config.hidden_size * (2 if config.norm.bias else 1)


def weight_bytes(
    config: DecoderConfig, bytes_per_value: int, *, bytes_per_linear: float, tied_head_shares: bool
) -> int:
    """Bytes resident after loading. `tied_head_shares`: a tied head is the embedding's own memory, not a copy."""
    count = count_weights(config)
    head = 0 if config.tie_embeddings and tied_head_shares else count.head
    return int((count.linear + head) * bytes_per_linear + (count.embedding + count.small) * bytes_per_value)


def step_weight_bytes(config: DecoderConfig, bytes_per_value: int, *, bytes_per_linear: float) -> int:
    """Bytes of weights that one decode step of one token reads: everything but the embedding table and learned
    positions, of which it reads a row, and the experts that it does not visit."""
    count = count_weights(config)
    small = count.small
    if config.learned_position_offset is not None:
        small -= (config.max_position + config.learned_position_offset) * config.hidden_size
    return int((count.linear - count.idle + count.head) * bytes_per_linear + small * bytes_per_value)


def kv_bytes_per_token(group: KVGroup, bytes_per_value: int) -> int:
    """Keys and values of one token in all the group's layers."""
    return 2 * len(group.layers) * group.num_kv_heads * group.head_dim * bytes_per_value


def activation_bytes(config: DecoderConfig, num_tokens: int, num_rows: int, bytes_per_value: int) -> int:
    """The most that a step of `num_tokens` tokens, `num_rows` of which are sampled, holds at once: the residual
    stream, the widest layer's input and output, and float32 logits with their sampling copies."""
    a = config.attention
    qkv = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
    widest = max(qkv + a.num_heads * a.head_dim, 3 * config.mlp.intermediate_size)
    if config.moe is not None:  # each token's copies on the way to its experts, and its experts' inner values
        widest = max(widest, config.moe.experts_per_token * (2 * config.hidden_size + 3 * config.moe.intermediate_size))
    return num_tokens * (2 * config.hidden_size + widest) * bytes_per_value + 3 * num_rows * config.vocab_size * 4


def logprob_rows(vocab_size: int, num_top: int) -> int:
    """Rows whose log probabilities, `num_top` returned of each, are computed at once: what LOGPROB_WORKSPACE holds."""
    return max(1, LOGPROB_WORKSPACE // _scoring_bytes(vocab_size, num_top))


def logprob_workspace_bytes(vocab_size: int, num_rows: int) -> int:
    """The most that scoring `num_rows` rows (prompt_logprobs, logprobs) holds at once, whatever k: LOGPROB_WORKSPACE
    where the rows need slices, their own size where they are few, and one row where even that is more."""
    row = _scoring_bytes(vocab_size, vocab_size)
    return max(row, min(LOGPROB_WORKSPACE, num_rows * row))


def _scoring_bytes(vocab_size: int, num_top: int) -> int:
    return vocab_size * LOGIT_BYTES + min(num_top, vocab_size) * TOP_BYTES


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
    groups: Sequence[KVGroup],
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

    def blocks_for(tokens: int) -> tuple[int, ...]:
        counts = []
        for group in groups:
            need = tokens
            if group.window is not None:  # two blocks a request for the unaligned ends of its window
                need = min(tokens, max_num_seqs * (group.window + 2 * block_size) + step_tokens)
            counts.append(max(1, -(-need // block_size)))
        return tuple(counts)

    low, high = block_size, max_num_seqs * -(-max_model_len // block_size) * block_size
    if cache_bytes(groups, blocks_for(high), block_size, bytes_per_value) > budget_bytes:
        while high - low > block_size:  # the largest whole number of blocks that fits
            middle = (low + high) // 2 // block_size * block_size
            fits = cache_bytes(groups, blocks_for(middle), block_size, bytes_per_value) <= budget_bytes
            low, high = (middle, high) if fits else (low, middle)
        high = low
    counts = blocks_for(high)
    return CachePlan(counts, cache_bytes(groups, counts, block_size, bytes_per_value), block_size)


def cache_bytes(groups: Sequence[KVGroup], num_blocks: Sequence[int], block_size: int, bytes_per_value: int) -> int:
    """Bytes of a cache of so many blocks a group, each group's null block included."""
    return sum(
        (count + 1) * block_size * kv_bytes_per_token(group, bytes_per_value)
        for group, count in zip(groups, num_blocks, strict=True)
    )


def gib(nbytes: float) -> str:
    """'1.23 GiB'."""
    return f"{nbytes / GIB:.2f} GiB"
