"""All that a forward pass sees: tokens, positions, and where their keys and values live. Nothing is hidden in globals.

Shapes: T tokens of the step, R requests of the step, B blocks of the longest block table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Segment:
    """Requests of one step that attend together (kernels/attention_plan.py). L keys each.

    `queries`: their rows of T. `keys`: a slice of slots (one request, consecutive blocks) or the block ids to gather,
    R * L / block_size of them. Which key a query sees: for one request `causal`, or else `mask` [queries, L], True
    where it does (None: all); for a batch, of as many queries each, `bias` [R, queries, L], float32, -inf where not.
    """

    queries: slice | torch.Tensor
    num_requests: int
    keys: slice | torch.Tensor
    num_keys: int
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    causal: bool = False


@dataclass(frozen=True)
class GroupMetadata:
    """Where one KV group (config.KVGroup) keeps this step's tokens, and which of them attend together."""

    block_tables_RB: torch.Tensor  # int32; rows padded with the null block 0
    slot_mapping_T: torch.Tensor  # int64; token t's key goes to slot block * block_size + offset
    window: int | None
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Ragged:
    """Where each request's queries lie, and how much it attends over, for kernels that look on the device
    (kernels/varlen_attention.py). The first `decodes` requests have one query each, and may be split over their
    contexts; 0: none is, and every query is treated alike."""

    starts_R: torch.Tensor  # int32, R + 1 of them: rows of T
    lens_R: torch.Tensor  # int32
    decodes: int = 0


@dataclass(frozen=True)
class AttentionMetadata:
    """The ragged batch: request r owns tokens query_starts[r]:query_starts[r+1], which are its last ones, and
    attends over its `seq_lens[r]` tokens (those of this step included). Host ints, so that no device is asked.

    `lens_R`: those lengths on the device, where every request has equally many queries and a kernel reads lengths and
    block tables there (kernels/decode_attention.py). Groups then have no segments, and a captured step, whose tensors
    hold other requests at every replay, has no `seq_lens`. `ragged`: likewise, where requests have any number of
    queries.
    """

    query_starts: Sequence[int]  # R + 1
    seq_lens: Sequence[int]  # R
    block_size: int
    groups: tuple[GroupMetadata, ...]
    lens_R: torch.Tensor | None = None  # int32
    counts: torch.Tensor | None = None  # int32, that kernel's: see make_counts there
    ragged: Ragged | None = None


@dataclass(frozen=True)
class ModelInputs:
    token_ids_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64
    attention: AttentionMetadata


@dataclass(frozen=True)
class KVLayer:
    """One layer's paged keys and values: [kv_heads, slots, head_dim], slot = block * block_size + offset.
    Heads outermost: a request whose blocks are consecutive is a view of it, and a head shard is a slice."""

    k_HSD: torch.Tensor
    v_HSD: torch.Tensor
    group: int  # index into AttentionMetadata.groups
