"""Attention of a ragged batch over the paged cache, in Triton: prefill chunks of any lengths, each with what its cache
holds before it, in one launch (FlashAttention-2, Dao, 2023; online softmax, Milakov and Gimelshein, 2018).

Legend: T tokens, H query heads, K key/value heads, G = H / K, R requests, B blocks of the longest table, D head size,
X rows of a tile: a query in one of the G heads that share a key head.

Query starts, lengths and block tables are read on the device. Keys are taken `keys_a_tile` at a time, from multiples of
that on, always in the order of their positions: so a query's result follows from its own context and VarlenLaunch, to
the bit, wherever its chunk begins and whoever its neighbours are.

The plain twin is `varlen_attention_plain`, with the same tiles; the slow one kernels/attention.py: paged_attention_ref.
The kernel is in kernels/varlen_attention_triton.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from paceline.inputs import KVLayer, Ragged
from paceline.kernels.decode_attention import decode_attention, decode_refusal, tensor_arguments
from paceline.kernels.gpu import gpu, launch_options

REQUESTS = 64  # of a step that the kernel is compiled for, at least: it looks at all of them
# Of the plain twin: 16 rows are what a decode of a group of 4 fills a quarter of, and its products are fast enough.
PLAIN_ROWS, PLAIN_KEYS = 16, 256


@dataclass(frozen=True)
class VarlenLaunch:
    """How the queries are cut into programs. Not a function of the batch, or results would depend on it."""

    rows_a_tile: int  # a power of two, at least 16
    keys_a_tile: int  # the same
    warps: int
    stages: int  # of the loop over tiles: they are asked for stages - 1 ahead
    dependent: bool  # programmatic dependent launch: it starts while the kernel before it still runs


def default_launch(head_dim: int, itemsize: int, device: torch.device) -> VarlenLaunch:
    """Tiles that the registers hold: a program of 8 warps has 128 x 128 sums, 64 float32 registers a thread."""
    chip = gpu(device)
    if itemsize == 4:  # not on the matrix unit
        tile = 32 if head_dim <= 64 else 16
        return VarlenLaunch(tile, tile, 4, 2, chip.dependent)
    stages = 3 if chip.dependent else 2  # older GPUs have 100 KiB of shared memory or less
    if head_dim <= 64:
        return VarlenLaunch(128, 64, 4, stages, chip.dependent)
    if head_dim <= 128:
        return VarlenLaunch(128, 64, 8, stages, chip.dependent)
    return VarlenLaunch(64, 32, 8, 2, chip.dependent)


def varlen_refusal(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this kernel cannot take such a cache; None when it can. It takes what the decode's does."""
    return decode_refusal(head_dim, dtype, device)


def varlen_attention(
    q_THD: torch.Tensor,
    kv: KVLayer,
    block_tables_RB: torch.Tensor,
    ragged: Ragged,
    *,
    block_size: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes_H: torch.Tensor | None = None,
    launch: VarlenLaunch | None = None,
) -> torch.Tensor:
    """Attention of each request's queries, its last tokens, over its cached keys, their own included; [T, H, D],
    contiguous. A request may have no queries; tokens before the first request's are not written.

    `block_tables_RB` is int32; `q_THD` may be a slice of a wider projection, its last dimension contiguous. `window`,
    `soft_cap` and `slopes_H` are those of `paged_attention`. Products and sums are taken in float32.

    With `launch.dependent`, query starts are read before the end of the kernel launched just before this one is waited
    for: see decode_attention.
    """
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    import triton

    from paceline.kernels.varlen_attention_triton import attend_ragged

    tokens, heads, dim = q_THD.shape
    kv_heads, requests = kv.k_HSD.shape[0], ragged.lens_R.shape[0]
    out_THD = q_THD.new_empty((tokens, heads, dim))
    if tokens == 0 or requests == 0:
        return out_THD
    group = heads // kv_heads
    launch = launch or default_launch(dim, q_THD.element_size(), q_THD.device)
    # At most: every request but one may fill its last tile with one row. What is left over ends at once.
    most_tiles = tokens * group // launch.rows_a_tile + min(requests, tokens)
    attend_ragged[(kv_heads, most_tiles)](
        starts_ptr=ragged.starts_R,
        slopes_ptr=slopes_H,
        requests=requests,
        scale=scale,
        BLOCK_SIZE=block_size,
        WINDOW=window or 0,
        SOFT_CAP=soft_cap or 0.0,
        R_TILE=max(REQUESTS, triton.next_power_of_2(requests)),
        ROW_TILE=launch.rows_a_tile,
        KEY_TILE=launch.keys_a_tile,
        STAGES=launch.stages,
        DEPENDENT=launch.dependent,
        num_warps=launch.warps,
        # A tile with a mask and one without round alike: fused, a multiplication before a subtraction rounds once, and
        # a selection between the two prevents that.
        enable_fp_fusion=False,
        **tensor_arguments(q_THD, kv, block_tables_RB, ragged.lens_R, out_THD),
        **launch_options(launch.dependent),
    )
    return out_THD


def mixed_attention(
    q_THD: torch.Tensor,
    kv: KVLayer,
    block_tables_RB: torch.Tensor,
    ragged: Ragged,
    *,
    counts: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """varlen_attention with the first `ragged.decodes` requests through decode_attention, as one
    program here would read all of a decode's context. Options and the shape of the result as there; `counts` is
    decode_attention's."""
    decodes = ragged.decodes
    out_THD = varlen_attention(
        q_THD,
        kv,
        block_tables_RB[decodes:],
        Ragged(ragged.starts_R[decodes:], ragged.lens_R[decodes:]),
        **options,
    )
    if decodes:
        out_THD[:decodes] = decode_attention(
            q_THD[:decodes], kv, block_tables_RB[:decodes], ragged.lens_R[:decodes], counts=counts, **options
        )
    return out_THD


def varlen_attention_plain(
    q_THD: torch.Tensor,
    kv: KVLayer,
    block_tables_RB: torch.Tensor,
    ragged: Ragged,
    *,
    block_size: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain torch, tile by tile: every product has the same shape and every sum the same order, whatever
    else is in the batch, so here too a query's result is its own, to the bit."""
    kv_heads, group = kv.k_HSD.shape[0], q_THD.shape[1] // kv.k_HSD.shape[0]
    slopes_KG = None if slopes_H is None else slopes_H.view(kv_heads, group)
    out_THD = torch.empty_like(q_THD)
    starts, lens = ragged.starts_R.tolist(), ragged.lens_R.tolist()
    tile = max(1, PLAIN_ROWS // group)  # queries
    for r, length in enumerate(lens):
        start = length - (starts[r + 1] - starts[r])
        for first in range(starts[r], starts[r + 1], tile):
            rows = slice(first, min(first + tile, starts[r + 1]))
            q_QHD = q_THD.new_zeros((tile, *q_THD.shape[1:]), dtype=torch.float32)
            q_QHD[: rows.stop - first] = q_THD[rows]
            out_QHD = _attend_tile(
                q_QHD,
                kv,
                block_tables_RB[r].long(),
                range(start + first - starts[r], start + rows.stop - starts[r]),
                block_size,
                scale,
                window,
                soft_cap,
                slopes_KG,
            )
            out_THD[rows] = out_QHD[: rows.stop - first].to(q_THD.dtype)
    return out_THD


def _attend_tile(
    q_QHD: torch.Tensor,
    kv: KVLayer,
    table_B: torch.Tensor,
    positions: range,
    block_size: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    slopes_KG: torch.Tensor | None,
) -> torch.Tensor:
    """Of queries at `positions`, padded at their end to Q; float32 like `q_QHD`. X = Q * G rows, L keys a tile."""
    (queries, _, dim), kv_heads, device = q_QHD.shape, kv.k_HSD.shape[0], q_QHD.device
    q_KXD = q_QHD.view(queries, kv_heads, -1, dim).transpose(0, 1).reshape(kv_heads, -1, dim)
    group = q_KXD.shape[1] // queries
    position_X1 = (positions.start + torch.arange(queries, device=device)).repeat_interleave(group)[:, None]
    low = 0 if window is None else max(0, positions.start - window + 1)
    top_KX1 = q_KXD.new_full((*q_KXD.shape[:2], 1), -torch.inf)
    total_KX1, values_KXD = torch.zeros_like(top_KX1), torch.zeros_like(q_KXD)
    for first in range(low // PLAIN_KEYS * PLAIN_KEYS, positions.stop, PLAIN_KEYS):
        key_L = first + torch.arange(PLAIN_KEYS, device=device)
        own_L = (key_L >= low) & (key_L < positions.stop)
        blocks_L = table_B[(key_L // block_size).clamp(max=table_B.shape[0] - 1)]
        slots_L = torch.where(own_L, blocks_L * block_size + key_L % block_size, 0)
        k_KLD = kv.k_HSD[:, slots_L].float()
        v_KLD = kv.v_HSD[:, slots_L].float().masked_fill(~own_L[:, None], 0.0)
        distance_XL = position_X1 - key_L
        hidden_XL = ~own_L | (distance_XL < 0)
        if window is not None:
            hidden_XL |= distance_XL >= window
        scores_KXL = q_KXD @ k_KLD.transpose(1, 2) * scale
        if soft_cap is not None:
            scores_KXL = soft_cap * torch.tanh(scores_KXL / soft_cap)
        if slopes_KG is not None:
            scores_KXL -= slopes_KG.repeat(1, queries)[:, :, None] * distance_XL
        scores_KXL = scores_KXL.masked_fill(hidden_XL, -torch.inf)
        new_top_KX1 = torch.maximum(top_KX1, scores_KXL.amax(dim=-1, keepdim=True))
        base_KX1 = new_top_KX1.masked_fill(new_top_KX1 == -torch.inf, 0.0)
        weights_KXL, shrink_KX1 = (scores_KXL - base_KX1).exp(), (top_KX1 - base_KX1).exp()
        total_KX1 = total_KX1 * shrink_KX1 + weights_KXL.sum(dim=-1, keepdim=True)
        values_KXD = values_KXD * shrink_KX1 + weights_KXL @ v_KLD
        top_KX1 = new_top_KX1
    values_KXD = values_KXD / total_KX1.masked_fill(total_KX1 == 0.0, 1.0)  # padding may see no key
    return values_KXD.view(kv_heads, queries, group, dim).transpose(0, 1).reshape(q_QHD.shape)
