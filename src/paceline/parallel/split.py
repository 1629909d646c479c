"""Who holds what of a model that several ranks share. No torch: the driver checks it before it starts any of them.

Tensor parallel as in Megatron-LM (Shoeybi et al., 2019): q, k, v and the MLP's first matrices by rows, that is by heads
and by inner channels, what follows them by columns, and one sum over the ranks after each of those. The output head is
split by vocabulary. The embedding is whole on every rank: a step reads a few of its rows, and a shard of it would cost
another sum. A pipeline stage has whole layers.

Rank `tensor + stage * parallel.tensor`: the ranks that exchange most are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from paceline.config import DecoderConfig, KVGroup, ParallelConfig
from paceline.sizing import Held


@dataclass(frozen=True)
class Rank:
    """One of `parallel.world_size`."""

    index: int
    parallel: ParallelConfig

    @property
    def tensor(self) -> int:
        """Which shard of its layers' matrices."""
        return self.index % self.parallel.tensor

    @property
    def stage(self) -> int:
        """Which of the groups of layers."""
        return self.index // self.parallel.tensor

    @property
    def is_first(self) -> bool:
        """Whether it embeds the tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the output head."""
        return self.stage == self.parallel.pipeline - 1

    @property
    def leads(self) -> bool:
        """Whether it adds what its shards share, the residual and the bias, once for all of them."""
        return self.tensor == 0

    def __str__(self) -> str:
        return f"rank {self.index} of {self.parallel.world_size}"


def split_refusal(config: DecoderConfig, parallel: ParallelConfig) -> str | None:
    """Why the model cannot be split so; None where it can."""
    count, a, m = parallel.tensor, config.attention, config.mlp
    if parallel.pipeline > config.num_layers:
        return f"pipeline_parallel_size {parallel.pipeline} is more than the model's {config.num_layers} layers"
    if count == 1:
        return None
    if a.num_heads % count:
        return _indivisible(count, f"{a.num_heads} attention heads", a.num_heads)
    if a.num_kv_heads % count and count % a.num_kv_heads:
        return (
            f"tensor_parallel_size {count} and the model's {a.num_kv_heads} key-value heads: one must be a multiple of "
            "the other"
        )
    if any(not config.is_moe(layer) for layer in range(config.num_layers)) and m.intermediate_size % count:
        return _indivisible(count, f"{m.intermediate_size} inner channels of the MLP", m.intermediate_size)
    if config.moe is not None and config.moe.intermediate_size % count:
        size = config.moe.intermediate_size
        return _indivisible(count, f"{size} inner channels of an expert", size)
    if a.qk_norm == "projection":
        return (
            f"tensor_parallel_size {count}: this model norms all heads of q and of k together, which no shard has; "
            "use pipeline_parallel_size"
        )
    return None


def _indivisible(count: int, what: str, number: int) -> str:
    fitting = [n for n in range(1, count) if number % n == 0]
    return f"tensor_parallel_size {count} does not divide the model's {what}: use {fitting[-1]}, or a multiple of it"


def layers_of(num_layers: int, rank: Rank) -> range:
    """The layers of a rank's stage; where they do not divide, the first stages have one more."""
    stages, stage = rank.parallel.pipeline, rank.stage
    each, more = divmod(num_layers, stages)
    first = stage * each + min(stage, more)
    return range(first, first + each + (stage < more))


def share(total: int, rank: Rank) -> range:
    """A rank's part of `total` rows or columns, which its shards divide."""
    each = total // rank.parallel.tensor
    return range(rank.tensor * each, (rank.tensor + 1) * each)


def vocabulary_of(vocab_size: int, rank: Rank) -> range:
    """A rank's part of the output head: the last one's may be shorter."""
    each = -(-vocab_size // rank.parallel.tensor)
    return range(min(rank.tensor * each, vocab_size), min((rank.tensor + 1) * each, vocab_size))


def kv_heads_of(config: DecoderConfig, rank: Rank) -> range:
    """A rank's key-value heads: those of its query heads. More ranks than heads share them."""
    heads, count = config.attention.num_kv_heads, rank.parallel.tensor
    if heads >= count:
        return share(heads, rank)
    head = rank.tensor * heads // count
    return range(head, head + 1)


def local_config(config: DecoderConfig, rank: Rank) -> DecoderConfig:
    """The decoder that a rank builds: its layers, numbered from 0, and its shard of each."""
    count, layers = rank.parallel.tensor, layers_of(config.num_layers, rank)
    moe = config.moe
    if moe is not None:
        own = tuple(layer - layers.start for layer in moe.layers if layer in layers)
        moe = replace(moe, layers=own, intermediate_size=moe.intermediate_size // count) if own else None
    inner = config.mlp.intermediate_size
    if any(not config.is_moe(layer) for layer in layers):
        inner //= count
    return replace(
        config,
        num_layers=len(layers),
        attention=replace(
            config.attention,
            num_heads=config.attention.num_heads // count,
            num_kv_heads=len(kv_heads_of(config, rank)),
        ),
        mlp=replace(config.mlp, intermediate_size=inner),
        moe=moe,
        windows=config.windows[layers.start : layers.stop],
        no_rope_layers=tuple(layer - layers.start for layer in config.no_rope_layers if layer in layers),
        learned_position_offset=config.learned_position_offset if rank.is_first else None,
        embedding_norm=config.embedding_norm and rank.is_first,
    )


def local_groups(config: DecoderConfig, rank: Rank) -> tuple[KVGroup, ...]:
    """The whole model's KV groups, one for one, as this rank holds them: its layers and heads, maybe no layer."""
    layers, heads = layers_of(config.num_layers, rank), len(kv_heads_of(config, rank))
    return tuple(
        replace(
            group,
            layers=tuple(layer - layers.start for layer in group.layers if layer in layers),
            num_kv_heads=heads,
        )
        for group in config.kv_groups
    )


def held_by(config: DecoderConfig, rank: Rank) -> Held:
    """What `rank` holds of the whole model `config` beside its layers."""
    looked_up = rank.is_first or (rank.is_last and config.tie_embeddings)
    return Held(
        embedding_rows=config.vocab_size if looked_up else 0,
        head_rows=len(vocabulary_of(config.vocab_size, rank)) if rank.is_last else 0,
        sum_biases=rank.leads,
    )
