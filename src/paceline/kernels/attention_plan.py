"""Plan the attention of one step, once, for all layers: which rows attend together, and where their keys lie.

Legend: T tokens of the step, R requests of a segment, L key positions of a segment.

A step is a ragged batch. Where kernels read lengths and block tables on the device it needs no plan but which of them
takes which requests. Elsewhere its requests fall into segments:
- requests with the same few queries each (a decode has one, a decode with drafts some more) and contexts of similar
  length are gathered into one padded batch;
- any other request is a segment of its own and reads its keys without padding; when its blocks are consecutive the
  keys are a view of the cache, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from paceline.inputs import AttentionMetadata, GroupMetadata, Ragged, Segment
from paceline.kernels.decode_attention import make_counts
from paceline.sizing import BATCHED_KEYS, BATCHED_QUERIES
from paceline.transfer import send

# A padded batch holds contexts within one power of two, so at most half of what it gathers is padding.
SMALLEST_BUCKET = 256


@dataclass(frozen=True)
class _Request:
    """One request of the step, in one KV group: queries [first, first + count) of T, keys [low, length) of its context,
    read from block `low // block_size` on. `blocks`: its row of the step's padded tables."""

    first: int
    count: int
    length: int
    blocks: npt.NDArray[np.int32]
    window: int | None
    block_size: int

    @property
    def start(self) -> int:
        """Position of the first query."""
        return self.length - self.count

    @property
    def low(self) -> int:
        """The first position that any query sees."""
        return 0 if self.window is None else max(0, self.start - self.window + 1)

    @property
    def visible_blocks(self) -> npt.NDArray[np.int32]:
        return self.blocks[self.low // self.block_size : -(-self.length // self.block_size)]


def build_attention(
    query_starts: Sequence[int],
    seq_lens: Sequence[int],
    block_tables: Sequence[Sequence[Sequence[int]]],
    windows: Sequence[int | None],
    *,
    block_size: int,
    device: torch.device | str = "cpu",
    padded: bool = True,
    on_device: bool = False,
    deterministic: bool = False,
) -> AttentionMetadata:
    """The step's AttentionMetadata with its plan. `block_tables[g][r]` lists the blocks of request r in group g.

    `padded=False` gives every request a segment of its own: slower, and no request then reads a slot that is not
    its own, not even under a mask. `on_device`: kernels are there that read lengths and tables on the device. Requests
    with equally few queries then go through the decode's (kernels/decode_attention.py), others through that for any
    number of queries (kernels/varlen_attention.py), but for leading ones with one query each. `deterministic`: all go
    through the latter, or its plain twin, whatever the step.
    """
    counts_R: npt.NDArray[np.int64] = np.asarray(query_starts[1:], dtype=np.int64) - query_starts[:-1]
    starts_R = np.asarray(seq_lens, dtype=np.int64) - counts_R
    # Each token's request, and its position there.
    requests_T = np.repeat(np.arange(len(seq_lens)), counts_R)
    positions_T = np.arange(query_starts[-1]) + (starts_R - np.asarray(query_starts[:-1], dtype=np.int64))[requests_T]
    queries = set(counts_R.tolist())
    equally_few = len(queries) == 1 and 1 <= max(queries) <= BATCHED_QUERIES
    planned = not on_device and not deterministic
    groups = []
    for tables, window in zip(block_tables, windows, strict=True):
        tables_RB = _pad_tables(tables)
        slots_T = tables_RB[requests_T, positions_T // block_size].astype(np.int64) * block_size
        requests = [
            _Request(query_starts[r], query_starts[r + 1] - query_starts[r], length, tables_RB[r], window, block_size)
            for r, length in enumerate(seq_lens if planned else ())
        ]
        groups.append(
            GroupMetadata(
                block_tables_RB=send(tables_RB, device),
                slot_mapping_T=send(slots_T + positions_T % block_size, device),
                window=window,
                segments=tuple(_segments(requests, torch.device(device), padded)),
            )
        )
    step = AttentionMetadata(tuple(query_starts), tuple(seq_lens), block_size, tuple(groups))
    if planned:
        return step
    lens_R = send(np.asarray(seq_lens, dtype=np.int32), device)
    if equally_few and not deterministic:
        return replace(step, lens_R=lens_R, counts=make_counts(len(seq_lens), device))
    decodes = 0 if deterministic else int(np.argmin(np.append(counts_R, 0) == 1))
    starts_R1 = send(np.asarray(query_starts, dtype=np.int32), device)
    counts = make_counts(decodes, device) if decodes else None
    return replace(step, counts=counts, ragged=Ragged(starts_R1, lens_R, decodes))


def _pad_tables(tables: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    """[R, B], padded with the null block; through one flat array: torch.tensor takes three times as long for 256 lists
    of 80 to 100."""
    lengths_R = np.array([len(table) for table in tables], dtype=np.int64)
    width = int(lengths_R.max(initial=0))
    tables_RB = np.zeros((len(tables), width), dtype=np.int32)
    flat = np.fromiter(chain.from_iterable(tables), dtype=np.int32, count=int(lengths_R.sum()))
    tables_RB[np.arange(width) < lengths_R[:, None]] = flat
    return tables_RB


def _segments(requests: Sequence[_Request], device: torch.device, padded: bool) -> list[Segment]:
    batches: dict[tuple[int, int], list[_Request]] = {}
    segments = []
    for request in requests:
        if padded and 1 <= request.count <= BATCHED_QUERIES:
            visible = request.length - request.low
            bucket = max(SMALLEST_BUCKET, 1 << (visible - 1).bit_length())
            batches.setdefault((request.count, bucket), []).append(request)
        elif request.count:
            segments.append(_single(request, device))
    for (_, bucket), members in batches.items():
        most = max(1, BATCHED_KEYS // bucket)
        for part in (members[first : first + most] for first in range(0, len(members), most)):
            segments.append(_single(part[0], device) if len(part) == 1 else _batch(part, device))
    return segments


def _single(request: _Request, device: torch.device) -> Segment:
    size = request.block_size
    blocks = request.visible_blocks
    base = request.low // size * size  # position of the first key read
    keys: slice | torch.Tensor
    if (np.diff(blocks) == 1).all():
        first = int(blocks[0]) * size
        keys = slice(first + request.low - base, first + request.length - base)
        base = request.low
    else:
        keys = send(blocks.astype(np.int64), device)
    num_keys = request.length - base
    queries = slice(request.first, request.first + request.count)
    sees_all = request.count == 1 and base == request.low
    causal = request.start == 0 and base == 0 and (request.window is None or request.count <= request.window)
    mask = None
    if not sees_all and not causal:
        query_positions = torch.arange(request.start, request.length, device=device)[:, None]
        key_positions = torch.arange(base, request.length, device=device)[None, :]
        mask = key_positions <= query_positions
        if request.window is not None:
            mask &= key_positions > query_positions - request.window
    return Segment(queries, 1, keys, num_keys, mask, causal=causal and not sees_all)


def _batch(members: Sequence[_Request], device: torch.device) -> Segment:
    size, count = members[0].block_size, members[0].count
    tables = [request.visible_blocks for request in members]
    width = max(len(table) for table in tables)
    blocks_RB = np.zeros((len(members), width), dtype=np.int64)
    for row_B, table in zip(blocks_RB, tables, strict=True):
        row_B[: len(table)] = table
    keys = send(blocks_RB.reshape(-1), device)
    # Positions of queries and keys, counted from each request's first key read.
    starts_R = np.array([r.start - r.low // size * size for r in members])
    last_RQ1 = send(starts_R[:, None] + np.arange(count), device)[:, :, None]
    keys_L = torch.arange(width * size, device=device)
    visible_RQL = keys_L <= last_RQ1
    if members[0].window is not None:
        visible_RQL &= keys_L > last_RQ1 - members[0].window
    bias_RQL = torch.zeros(visible_RQL.shape, device=device).masked_fill_(~visible_RQL, float("-inf"))
    rows = [row for request in members for row in range(request.first, request.first + count)]
    queries: slice | torch.Tensor = slice(rows[0], rows[0] + len(rows))
    if rows != list(range(rows[0], rows[0] + len(rows))):
        queries = send(np.array(rows, dtype=np.int64), device)
    return Segment(queries, len(members), keys, width * size, bias=bias_RQL)
