"""The one memory formula: what a model's weights, its cache and a step's activations take, in bytes.

What is told before loading and what the engine then allocates come from here, so that they cannot differ.
No torch: sizes follow from the configuration alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paceline.config import DecoderConfig, KVGroup

GIB = 1 << 30
SAMPLING_BYTES = 60  # of one logit while a token is chosen, every filter on and a flat distribution
CUDA_SAMPLING_BYTES = 100  # there, where sorting takes more: 96 were held of 64 rows of 128,256 logits
STATIC_SAMPLING_BYTES = 72  # by the sampler of captured decodes, which sorts once: 53 were held
KEPT_LOGIT_BYTES = 16  # of those while none of the row is filtered or drawn: the logits, and as penalties left them
SAMPLED_VALUES = 1 << 22  # logits that are filtered and drawn from at once: 32 rows of 128,256, 400 MB of a GPU
PENALTY_BYTES = 40  # of one token of a request's history where every penalty is on
SMALL_STEP = 512  # tokens of prompts in a step that others wait for; see engine/open_step.py
PROMPTS = 16  # of such a step, where a CUDA graph holds it, one of them of tokens that fill it up
PACKED_ROWS = 256  # multiplied by a matrix as it is packed, by the GEMV kernels
PARTS_BYTES = 4 * 128 * 2 * 160  # of one row of those: two programs of 128 outputs each for 160 multiprocessors
MOST_SPLITS = 32  # parts of a context that the decode attention kernel reads side by side
BATCHED_QUERIES = 8  # up to here a request's queries cost less in a batch than the calls of a segment of its own
BATCHED_KEYS = 1 << 17  # keys that one batch of decodes gathers: 512 MiB a layer of 8 heads of 128 in 16 bits
# Float32 scores that one request's queries may take at once where they are written out; 64 MiB are 2,048 queries over
# 1,024 keys of 8 heads.
SCORE_BYTES = 64 << 20
LOGPROB_WORKSPACE = 64 << 20  # bytes that scoring a slice of rows takes: 27 rows of 152,000 tokens
LOGIT_BYTES = 16  # of one value while it is scored: the head's output, float32 logits, log softmax, a comparison
TOP_BYTES = 12  # of one returned value: float32 and its int64 index


MatrixBytes = Callable[[int, int], int]
"""Bytes of a matrix of so many rows and columns."""


@dataclass(frozen=True)
class FormatBytes:
    """Bytes of a model's matrices in some weight format: those in its layers, and its output head, which may be in a
    finer one (formats.stored_bytes, resident_bytes and unpack_bytes)."""

    layers: MatrixBytes
    head: MatrixBytes


@dataclass(frozen=True)
class Held:
    """What one of the devices that share a model holds beside its part of the layers (parallel/split.py): rows of the
    embedding and of the output head; `sum_biases`: those that are added once to a sum over the devices."""

    embedding_rows: int
    head_rows: int
    sum_biases: bool = True


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


def whole(config: DecoderConfig) -> Held:
    """What the only device holds."""
    return Held(config.vocab_size, config.vocab_size)


def small_values(config: DecoderConfig, *, sum_biases: bool = True) -> int:
    """Values of norms, biases and routers, which stay in the model's dtype whatever the weight format."""
    a, m, r, hidden = config.attention, config.mlp, config.residual, config.hidden_size
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    norm = hidden * (2 if config.norm.bias else 1)
    layer = (q + 2 * kv) * a.qkv_bias + hidden * (a.out_bias and sum_biases)
    layer += {None: 0, "head": 2 * a.head_dim, "projection": q + kv}[a.qk_norm]
    layer += norm * ((1 if r.shared_norm else 2) * r.pre_norms + 2 * r.post_norms)
    moe_layers = routers = 0
    if config.moe is not None:
        moe_layers = len(config.moe.layers)
        routers = moe_layers * config.moe.num_experts * hidden
    mlp_biases = ((2 if m.gated else 1) * m.intermediate_size + hidden * sum_biases) * m.bias
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
    config: DecoderConfig,
    bytes_per_value: int,
    matrix_bytes: FormatBytes,
    *,
    tied_head_shares: bool,
    held: Held | None = None,
) -> WeightBytes:
    """Bytes resident after loading. `tied_head_shares`: a tied head is the embedding's own memory, not a copy. `held`:
    None is the whole model's."""
    held = held or whole(config)
    matrices = layer_matrices(config)
    sizes = [m.count * matrix_bytes.layers(m.rows, m.columns) for m in matrices]
    return WeightBytes(
        layers=sum(size for m, size in zip(matrices, sizes, strict=True) if not m.experts),
        experts=sum(size for m, size in zip(matrices, sizes, strict=True) if m.experts),
        head=0 if config.tie_embeddings and tied_head_shares else matrix_bytes.head(held.head_rows, config.hidden_size),
        embedding=(held.embedding_rows * config.hidden_size + position_values(config)) * bytes_per_value,
        small=small_values(config, sum_biases=held.sum_biases) * bytes_per_value + constant_bytes(config),
    )


def step_weight_bytes(
    config: DecoderConfig,
    bytes_per_value: int,
    matrix_bytes: FormatBytes,
    num_tokens: int = 1,
    held: Held | None = None,
) -> int:
    """Bytes of weights that one decode step of `num_tokens` tokens reads: everything but the embedding tables, of which
    it reads a row a token, and the experts that no token visits (Matrices.visited)."""
    held = held or whole(config)
    read = sum(m.visited(num_tokens) * matrix_bytes.layers(m.rows, m.columns) for m in layer_matrices(config))
    read += matrix_bytes.head(held.head_rows, config.hidden_size)
    return round(read) + small_values(config, sum_biases=held.sum_biases) * bytes_per_value


def kv_bytes_per_token(group: KVGroup, bytes_per_value: int) -> int:
    """Keys and values of one token in all the group's layers."""
    return 2 * len(group.layers) * group.num_kv_heads * group.head_dim * bytes_per_value


@dataclass(frozen=True)
class StepShape:
    """The largest step: `num_tokens` tokens, at most `chunk` of one request, of at most `num_seqs` requests whose
    contexts hold at most `context` tokens. `greedy`: every request takes its likeliest token; `scores`: some may want
    the log probabilities of their prompt, of many rows at once."""

    num_tokens: int
    num_seqs: int
    context: int
    chunk: int
    block_size: int = 16
    greedy: bool = False
    scores: bool = True


@dataclass(frozen=True)
class Backend:
    """What a step's memory depends on besides its shape. `sampling_bytes`: of a logit, every filter on; `packed_rows`:
    up to so many rows are multiplied without unpacking a matrix, each in parts of `parts_bytes`; `splits`: of each
    query of a decode, as many answers in float32 wait to be merged."""

    sampling_bytes: int = SAMPLING_BYTES
    packed_rows: int = 0
    splits: int = 0
    parts_bytes: int = 0


PLAIN = Backend()


def cuda_backend(bytes_per_value: int) -> Backend:
    """The GEMV kernel is one of 16 bits."""
    if bytes_per_value != 2:
        return Backend(CUDA_SAMPLING_BYTES, splits=MOST_SPLITS)
    return Backend(CUDA_SAMPLING_BYTES, PACKED_ROWS, MOST_SPLITS, PARTS_BYTES)


def activation_bytes(
    config: DecoderConfig,
    step: StepShape,
    bytes_per_value: int,
    *,
    unpacked: FormatBytes | None = None,
    backend: Backend = PLAIN,
    held: Held | None = None,
) -> int:
    """An upper bound of what a step holds at once beside weights and cache: the widest moment of a layer, or, after
    the last layer, the hidden states and what sampling makes of the logits. Tests hold it to a count of live tensors.
    `unpacked`: what the weight format multiplies many rows through, a copy of the matrix in the model's dtype.
    """
    a, hidden = config.attention, config.hidden_size
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    ropes = {config.rope_of(layer) for layer in range(config.num_layers)}
    turns = sum(2 * rope.dim for rope in ropes if rope is not None)
    # Beside the fused projection: q and k as they turn, in three temporaries, fewer where only a part turns; where they
    # are normalised first, also their norms, and one of them turns at a time. Then the turned ones, and the
    # answers of a segment, of all of them, and their copy for the projection.
    share = max((rope.dim / a.head_dim for rope in ropes if rope is not None), default=0.0)
    turned = max(3 * share, share + 1) if ropes != {None} else 0.0
    rotary = (q + 2 * kv) + (turned * (q + kv) if a.qk_norm is None else (q + kv) + max(turned, 1) * q)
    attended = (q + 2 * kv) + (q + kv) + 3 * q
    workspace = max(_attention_workspace(config, step, bytes_per_value), split_bytes(config, step, backend.splits))
    attention = int(step.num_tokens * max(rotary, attended) * bytes_per_value) + workspace
    mlp = step.num_tokens * _mlp_values(config) * bytes_per_value
    parts = min(step.num_tokens, backend.packed_rows) * backend.parts_bytes
    # Beside either: the residual stream before and after attention, what was normalised, and the half's own output.
    stream = step.num_tokens * (4 * hidden + turns) * bytes_per_value
    rows = min(step.num_seqs, step.num_tokens)
    copies = head = 0
    if unpacked and step.num_tokens > backend.packed_rows:
        copies = max(unpacked.layers(m.rows, m.columns) for m in layer_matrices(config))
    if unpacked and (rows > backend.packed_rows or step.scores):
        head = unpacked.head((held or whole(config)).head_rows, hidden)
    at_once = min(rows, sampled_rows(config.vocab_size))
    sampled = rows * KEPT_LOGIT_BYTES + at_once * (backend.sampling_bytes - KEPT_LOGIT_BYTES)
    sampling = config.vocab_size * sampled + rows * step.context * PENALTY_BYTES
    if step.greedy:
        edited = 8 if config.logit_scale != 1.0 or config.logit_soft_cap is not None else 0
        sampling = rows * config.vocab_size * (bytes_per_value + 4 + edited)
    last = step.num_tokens * hidden * bytes_per_value + sampling + head
    return max(stream + max(attention, mlp) + parts + copies, last) + _mask_bytes(config, step)


def _mlp_values(config: DecoderConfig) -> int:
    """Values a token that the widest MLP holds at once."""
    m, widest = config.mlp, 0
    if config.moe is None or len(config.moe.layers) < config.num_layers:
        widest = (4 if m.gated else 2) * m.intermediate_size  # gate and up, the activation, the product
    if config.moe is not None:  # sorted tokens, each expert's answers, all of them, in order, weighted
        e = config.moe
        answers = 4 * e.experts_per_token * config.hidden_size
        widest = max(widest, answers + 4 * e.intermediate_size)  # one expert may have every token
    return widest


def context_bytes(groups: Sequence[KVGroup], context: int, bytes_per_value: int) -> int:
    """Keys and values that one query at the end of `context` tokens attends to: of a windowed layer, its window's."""
    return sum(kv_bytes_per_token(group, bytes_per_value) * min(context, group.window or context) for group in groups)


def _visible(window: int | None, step: StepShape) -> int:
    """Keys that the queries of one request see, to whole blocks at both ends."""
    seen = step.context if window is None else min(step.context, window + step.chunk)
    return seen + 2 * step.block_size


def _attention_workspace(config: DecoderConfig, step: StepShape, bytes_per_value: int) -> int:
    """Keys and values that are gathered from blocks, and scores that are written out, of one layer."""
    a = config.attention
    widest = max(_visible(group.window, step) for group in config.kv_groups)
    gathered = 2 * a.num_kv_heads * a.head_dim * bytes_per_value  # a key
    # Requests with few queries are gathered together, each padded to the longest of them.
    queries = min(BATCHED_QUERIES, step.chunk)
    together = min(BATCHED_KEYS, min(step.num_seqs, step.num_tokens) * widest)
    scores = a.num_heads * queries * (3 * bytes_per_value if a.alibi is None else 12)
    pairs = step.chunk * widest
    alone = widest * gathered
    if a.soft_cap is not None or a.alibi is not None:
        alone += 3 * min(SCORE_BYTES, 4 * a.num_heads * pairs) + 2 * pairs
    elif step.chunk > 1:
        alone += pairs * bytes_per_value  # the mask as torch's attention wants it
    return max(together * (gathered + scores), alone)


def split_bytes(config: DecoderConfig, step: StepShape, splits: int) -> int:
    """Answers and weights in float32 of the parts of each context, before they are merged: of the queries that share a
    key head whole tiles of 16."""
    a = config.attention
    rows = -(-min(BATCHED_QUERIES, step.chunk) * a.num_heads // (16 * a.num_kv_heads)) * 16
    return 4 * splits * step.num_seqs * a.num_kv_heads * rows * (a.head_dim + 2)


def _mask_bytes(config: DecoderConfig, step: StepShape) -> int:
    """Which key each query sees, for all requests of the step and each KV group: float32 over padded keys where a
    request has few queries, else a byte."""
    few = min(step.num_tokens, BATCHED_QUERIES * step.num_seqs)
    masks = [(4 * few + step.num_tokens - few) * _visible(group.window, step) for group in config.kv_groups]
    return sum(masks) + max(masks) // 2  # and while one is made, its parts


def sampled_rows(vocab_size: int) -> int:
    """Rows that are filtered and drawn from at once."""
    return max(1, SAMPLED_VALUES // vocab_size)


def loading_bytes(
    config: DecoderConfig,
    bytes_per_value: int,
    read_bytes: int,
    *,
    packing: FormatBytes,
    packed: FormatBytes,
    kept: bool,
    held: Held | None = None,
) -> int:
    """The most that loading holds beside the weights, embedding first, then the layers, the output head last: a
    matrix before it is packed, and what packing takes beside. `kept`: it is stored as it is, without that; a tied
    head's values are the embedding's. `read_bytes`: of a value that is read onto the device itself, before it has its
    place and its dtype there.
    """
    held = held or whole(config)
    hidden = config.hidden_size

    def beside(values: int, size: int, packs: int) -> int:
        if kept:
            return read_bytes * values
        return values * bytes_per_value + max(packs, read_bytes * values - size)

    layers = max(
        beside(m.rows * m.columns, packed.layers(m.rows, m.columns), packing.layers(m.rows, m.columns))
        for m in layer_matrices(config)
    )
    head, packs = packed.head(held.head_rows, hidden), packing.head(held.head_rows, hidden)
    if not config.tie_embeddings:
        last = beside(held.head_rows * hidden, head, packs)
    else:
        head, last = (0, 0) if kept else (head, packs)
    return max(layers - head, last)


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
        return blocks_needed(groups, tokens, num_seqs=max_num_seqs, block_size=block_size, step_tokens=step_tokens)

    low, high = block_size, max_num_seqs * -(-max_model_len // block_size) * block_size
    if cache_bytes(groups, blocks_for(high), block_size, bytes_per_value) > budget_bytes:
        while high - low > block_size:  # the largest whole number of blocks that fits
            middle = (low + high) // 2 // block_size * block_size
            fits = cache_bytes(groups, blocks_for(middle), block_size, bytes_per_value) <= budget_bytes
            low, high = (middle, high) if fits else (low, middle)
        high = low
    counts = blocks_for(high)
    return CachePlan(counts, cache_bytes(groups, counts, block_size, bytes_per_value), block_size)


def blocks_needed(
    groups: Sequence[KVGroup], tokens: int, *, num_seqs: int, block_size: int, step_tokens: int
) -> tuple[int, ...]:
    """Blocks of each group for `tokens` tokens of context of `num_seqs` requests, the null block not counted."""
    counts = []
    for group in groups:
        need = tokens
        if group.window is not None:  # two blocks a request for the unaligned ends of its window
            need = min(tokens, num_seqs * (group.window + 2 * block_size) + step_tokens)
        counts.append(max(1, -(-need // block_size)))
    return tuple(counts)


def cache_bytes(groups: Sequence[KVGroup], num_blocks: Sequence[int], block_size: int, bytes_per_value: int) -> int:
    """Bytes of a cache of so many blocks a group, each group's null block included."""
    return sum(
        (count + 1) * block_size * kv_bytes_per_token(group, bytes_per_value)
        for group, count in zip(groups, num_blocks, strict=True)
    )


def gib(nbytes: float) -> str:
    """'1.23 GiB'."""
    return f"{nbytes / GIB:.2f} GiB"
