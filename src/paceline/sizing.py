"""The one memory formula: what a model's weights, its cache and a step's activations take, in bytes.

What is told before loading and what the engine then allocates come from here, so that they cannot differ.
No torch: sizes follow from the configuration alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paceline.config import DecoderConfig, KVGroup

GIB = 1 << 30
LOGPROB_WORKSPACE = 64 << 20  # bytes that scoring a slice of rows takes: 27 rows of 152,000 tokens
LOGIT_BYTES = 16  # of one value while it is scored: the head's output, float32 logits, log softmax, a comparison
TOP_BYTES = 12  # of one returned value: float32 and its int64 index


MatrixBytes = Callable[[int, int], int]
"""Bytes of a matrix of so many rows and columns in some weight format (formats.stored_bytes and resident_bytes)."""


@dataclass(frozen=True)
class Matrices:
    """`count` matrices of one shape. `experts`: of `count`, a token visits `active` of every `experts`; 0 is all."""

    count: int
    rows: int
    columns: int
    active: int = 0
    experts: int = 0

    @property
    def num_values(self) -> int:
        return self.count * self.rows * self.columns

    def visited(self, num_tokens: int) -> float:
        """How many of them a step of `num_tokens` tokens reads, on average where they are experts: of E, the distinct
        ones among `num_tokens` independent and equally likely choices of A are E * (1 - (1 - A/E)**num_tokens).
        Real routers prefer some experts and neighbouring tokens agree, so that fewer are read."""
        if not self.experts:
            return self.count
        return self.count * (1 - (1 - self.active / self.experts) ** num_tokens)


def layer_matrices(config: DecoderConfig) -> list[Matrices]:
    """Every matrix in the layers that is stored in the weight format."""
    a, m, hidden, layers = config.attention, config.mlp, config.hidden_size, config.num_layers
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    found = [Matrices(layers, q + 2 * kv, hidden), Matrices(layers, hidden, q)]
    dense = layers
    if config.moe is not None:
        e = config.moe
        dense -= len(e.layers)
        count, visit = len(e.layers) * e.num_experts, (e.experts_per_token, e.num_experts)
        found += [Matrices(count, 2 * e.intermediate_size, hidden, *visit)]
        found += [Matrices(count, hidden, e.intermediate_size, *visit)]
    if dense:
        inputs = 2 if m.gated else 1
        found += [Matrices(dense, inputs * m.intermediate_size, hidden), Matrices(dense, hidden, m.intermediate_size)]
    return found


def position_values(config: DecoderConfig) -> int:
    """Values of the learned position embeddings."""
    if config.learned_position_offset is None:
        return 0
    return (config.max_position + config.learned_position_offset) * config.hidden_size


def small_values(config: DecoderConfig) -> int:
    """Values of norms, biases and routers, which stay in the model's dtype whatever the weight format."""
    a, m, r, hidden = config.attention, config.mlp, config.residual, config.hidden_size
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    norm = hidden * (2 if config.norm.bias else 1)
    layer = (q + 2 * kv) * a.qkv_bias + hidden * a.out_bias
    layer += {None: 0, "head": 2 * a.head_dim, "projection": q + kv}[a.qk_norm]
    layer += norm * ((1 if r.shared_norm else 2) * r.pre_norms + 2 * r.post_norms)
    moe_layers = routers = 0
    if config.moe is not None:
        moe_layers = len(config.moe.layers)
        routers = moe_layers * config.moe.num_experts * hidden
    mlp_biases = ((2 if m.gated else 1) * m.intermediate_size + hidden) * m.bias
    return (
        config.num_layers * layer
        + (config.num_layers - moe_layers) * mlp_biases
        + routers
        + norm * (1 + config.embedding_norm)
    )


def num_parameters(config: DecoderConfig) -> int:
    """The model's parameters, a tied head counted once: the number that a model card gives."""
    table = config.vocab_size * config.hidden_size
    tables = table if config.tie_embeddings else 2 * table
    return sum(m.num_values for m in layer_matrices(config)) + tables + position_values(config) + small_values(config)


def constant_bytes(config: DecoderConfig) -> int:
    """Bytes of float32 tensors that are computed at load: a frequency a rotated dimension of each distinct rotary
    embedding, and the slopes of ALiBi."""
    ropes = {config.rope_of(layer) for layer in range(config.num_layers)}
    slopes = config.num_layers * config.attention.num_heads if config.attention.alibi is not None else 0
    return 4 * (sum(rope.dim for rope in ropes if rope is not None) + slopes)


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a decoder's weights. `layers` and `experts` (matrices) and `head` are in the weight format, the others
    in the model's dtype. `small`: norms, biases, routers and constants."""

    layers: int
    experts: int
    head: int
    embedding: int  # tokens and learned positions
    small: int

    @property
    def total(self) -> int:
        return self.layers + self.experts + self.head + self.embedding + self.small


def weight_bytes(
    config: DecoderConfig, bytes_per_value: int, matrix_bytes: MatrixBytes, *, tied_head_shares: bool
) -> WeightBytes:
    """Bytes resident after loading. `tied_head_shares`: a tied head is the embedding's own memory, not a copy."""
    matrices = layer_matrices(config)
    sizes = [m.count * matrix_bytes(m.rows, m.columns) for m in matrices]
    return WeightBytes(
        layers=sum(size for m, size in zip(matrices, sizes, strict=True) if not m.experts),
        experts=sum(size for m, size in zip(matrices, sizes, strict=True) if m.experts),
        head=0 if config.tie_embeddings and tied_head_shares else matrix_bytes(config.vocab_size, config.hidden_size),
        embedding=(config.vocab_size * config.hidden_size + position_values(config)) * bytes_per_value,
        small=small_values(config) * bytes_per_value + constant_bytes(config),
    )


def step_weight_bytes(
    config: DecoderConfig, bytes_per_value: int, matrix_bytes: MatrixBytes, num_tokens: int = 1
) -> int:
    """Bytes of weights that one decode step of `num_tokens` tokens reads: everything but the embedding tables, of which
    it reads a row a token, and the experts that no token visits (Matrices.visited)."""
    read = sum(m.visited(num_tokens) * matrix_bytes(m.rows, m.columns) for m in layer_matrices(config))
    read += matrix_bytes(config.vocab_size, config.hidden_size)
    return round(read) + small_values(config) * bytes_per_value


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
