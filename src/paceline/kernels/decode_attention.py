"""Attention of a decode over the paged cache, in Triton: the context is split, the parts are merged (Flash-Decoding,
Dao et al., 2023; online softmax, Milakov and Gimelshein, 2018).

Legend: T tokens, H query heads, K key/value heads, R requests, B blocks of the longest table, D head size, S splits,
X rows that share a key head: (queries a request) * (H / K).

Everything that changes from step to step is read from device tensors, so that a captured CUDA graph stays valid: the
grid is fixed, and a program finds out on the device which keys, if any, are its own. Split s takes the tiles s, s + S,
s + 2 S, ... of the context. So a request's result follows from its own length and `DecodeLaunch`, never from its
neighbours, and is the same at every run.

The plain twin is `decode_attention_plain`, and the slow one of both kernels/attention.py: paged_attention_ref; the
kernels are in kernels/decode_attention_triton.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.inputs import KVLayer
from paceline.kernels.gpu import gpu, triton_refusal

LARGEST_HEAD = 256
# Merging loads a row's parts as one tile of [splits, D].
MOST_SPLITS = 64
# tl.dot takes at least 16 rows; more than 64 rows of scores and sums would leave no registers for the keys in flight.
FEWEST_ROWS, MOST_ROWS = 16, 64


@dataclass(frozen=True)
class DecodeLaunch:
    """How one decode is cut into programs. Not a function of the batch, or results would depend on it."""

    splits: int  # programs a request and key head, at most MOST_SPLITS; a context of fewer tiles uses fewer
    keys_a_tile: int  # a power of two, at least 16
    warps: int
    stages: int  # of the loop over tiles; the look-up of a tile's slots takes one, its keys and values the others
    dependent: bool  # programmatic dependent launch: the next kernel starts while the last programs of this one end


def default_launch(rows: int, kv_heads: int, head_dim: int, itemsize: int, device: torch.device) -> DecodeLaunch:
    """For X = `rows`: three programs a multiprocessor, tiles of 8 KiB of keys and as many of values, two in flight.

    Llama-3.1-8B's heads in bfloat16, one stream on an H100, 512 and 8,192 tokens: 6.2 and 17.1 us a layer, merging
    included. Tiles of 16 KiB: 6.6 and 17.5 us with 2 warps, 7.4 and 18.3 with 4; without dependent launch 1 us more.
    """
    chip = gpu(device)
    dim = _padded(head_dim)
    keys = max(16, min(128, 8192 // (dim * itemsize)))
    return DecodeLaunch(
        splits=max(1, min(MOST_SPLITS, 3 * chip.processors // kv_heads)),
        keys_a_tile=keys,
        warps=max(1, min(8, _rows_a_tile(rows, itemsize) * dim // 2048)),  # 64 registers a thread for the sums
        stages=5 if keys * dim * itemsize <= 8192 else 3,  # more shared memory than older GPUs have, otherwise
        dependent=chip.dependent,
    )


def decode_refusal(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this kernel cannot take such a cache; None when it can."""
    if head_dim > LARGEST_HEAD:
        return f"heads of {head_dim} are larger than {LARGEST_HEAD}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype is {dtype}"
    return triton_refusal(device, dtype)


def decode_attention(
    q_THD: torch.Tensor,
    kv: KVLayer,
    block_tables_RB: torch.Tensor,
    seq_lens_R: torch.Tensor,
    *,
    block_size: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes_H: torch.Tensor | None = None,
    launch: DecodeLaunch | None = None,
) -> torch.Tensor:
    """Attention of each request's last T / R tokens over its cached keys, their own included; [T, H, D], contiguous.

    `block_tables_RB` and `seq_lens_R` are int32; `q_THD` may be a slice of a wider projection, its last dimension
    contiguous. A request of length 0 is an unused row of a captured step: it reads nothing and yields zeros.
    `window`, `soft_cap` and `slopes_H` are those of `paged_attention`. Products and sums are taken in float32.

    With `launch.dependent`, lengths and tables must not be what the kernel launched just before this one writes: they
    are read before its end is waited for. Raises ValueError where T is no multiple of R.
    """
    from paceline.kernels.decode_attention_triton import attend_split, merge_splits

    tokens, heads, dim = q_THD.shape
    kv_heads, requests = kv.k_HSD.shape[0], seq_lens_R.shape[0]
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    if tokens == 0:
        return out_THD
    queries, group = tokens // requests, heads // kv_heads
    if queries * requests != tokens:
        raise ValueError(f"{tokens} tokens are not equally many for each of {requests} requests")
    rows = queries * group
    launch = launch or default_launch(rows, kv_heads, dim, q_THD.element_size(), q_THD.device)
    rows_a_tile = _rows_a_tile(rows, q_THD.element_size())
    row_tiles = -(-rows // rows_a_tile)
    # Allocated here: in a captured graph the layers then share one piece of the graph's pool.
    parts_RKSXD = q_THD.new_empty((requests, kv_heads, launch.splits, rows, dim), dtype=torch.float32)
    weights_RKSX = q_THD.new_empty((requests, kv_heads, launch.splits, rows), dtype=torch.float32)
    shape = {
        "WINDOW": window or 0,
        "SPLITS": launch.splits,
        "KEY_TILE": launch.keys_a_tile,
        "QUERIES": queries,
        "GROUP": group,
        "D": dim,
        "D_TILE": _padded(dim),
        "DEPENDENT": launch.dependent,
    }
    attend_split[(launch.splits, kv_heads * row_tiles, requests)](
        q_THD,
        kv.k_HSD,
        kv.v_HSD,
        block_tables_RB,
        seq_lens_R,
        slopes_H,
        parts_RKSXD,
        weights_RKSX,
        scale,
        q_THD.stride(0),
        q_THD.stride(1),
        kv.k_HSD.stride(0),
        kv.v_HSD.stride(0),
        block_tables_RB.stride(0),
        BLOCK_SIZE=block_size,
        SOFT_CAP=soft_cap or 0.0,
        ROW_TILES=row_tiles,
        ROW_TILE=rows_a_tile,
        STAGES=launch.stages,
        num_warps=launch.warps,
        **({"launch_pdl": True} if launch.dependent else {}),
        **shape,
    )
    merge_splits[(rows, kv_heads, requests)](
        parts_RKSXD,
        weights_RKSX,
        seq_lens_R,
        out_THD,
        S_TILE=_power_of_2(launch.splits),
        num_warps=4,
        **({"launch_pdl": True} if launch.dependent else {}),
        **shape,
    )
    return out_THD


def decode_attention_plain(
    q_THD: torch.Tensor,
    kv: KVLayer,
    block_tables_RB: torch.Tensor,
    seq_lens_R: torch.Tensor,
    *,
    block_size: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain torch, where Triton is not: it too asks the device nothing, and so gathers whole tables.

    L = B * block_size keys a request. What lies beyond a request's length may be another's, NaN included.
    """
    tokens, heads, dim = q_THD.shape
    kv_heads, requests = kv.k_HSD.shape[0], seq_lens_R.shape[0]
    queries, group = tokens // requests, heads // kv_heads
    if queries * requests != tokens:
        raise ValueError(f"{tokens} tokens are not equally many for each of {requests} requests")
    offsets = torch.arange(block_size, device=q_THD.device)
    slots_RL = (block_tables_RB.long()[:, :, None] * block_size + offsets).flatten(1)
    distance_RQL = (
        seq_lens_R[:, None, None]
        + torch.arange(1 - queries, 1, device=q_THD.device)[:, None]
        - torch.arange(1, slots_RL.shape[1] + 1, device=q_THD.device)
    )
    hidden_RQL = distance_RQL < 0 if window is None else (distance_RQL < 0) | (distance_RQL >= window)
    hidden_RQ1L = hidden_RQL[:, None, :, None]  # over key heads and the heads that share one
    unread_RL = hidden_RQL.all(dim=1)[:, None, :, None]
    k_RKLD = kv.k_HSD[:, slots_RL].transpose(0, 1).float()
    v_RKLD = kv.v_HSD[:, slots_RL].transpose(0, 1).float().masked_fill(unread_RL, 0.0)
    q_RKXD = q_THD.view(requests, queries, kv_heads, group, dim).transpose(1, 2).flatten(2, 3).float()
    scores_RKQGL = (q_RKXD @ k_RKLD.transpose(2, 3)).view(requests, kv_heads, queries, group, -1) * scale
    if soft_cap is not None:
        scores_RKQGL = soft_cap * torch.tanh(scores_RKQGL / soft_cap)
    if slopes_H is not None:
        scores_RKQGL -= slopes_H.view(kv_heads, 1, group, 1) * distance_RQL[:, None, :, None]
    # The second fill is for a request of length 0, which sees nothing.
    probs_RKQGL = scores_RKQGL.masked_fill(hidden_RQ1L, -torch.inf).softmax(dim=-1).masked_fill(hidden_RQ1L, 0.0)
    out_RKQGD = (probs_RKQGL.flatten(2, 3) @ v_RKLD).view(requests, kv_heads, queries, group, dim)
    return out_RKQGD.transpose(1, 2).reshape(q_THD.shape).to(q_THD.dtype)


def _rows_a_tile(rows: int, itemsize: int) -> int:
    # float32 is multiplied without the matrix unit, and 64 rows of 256 spill 5 KB a thread.
    most = MOST_ROWS if itemsize == 2 else FEWEST_ROWS
    return max(FEWEST_ROWS, min(most, _power_of_2(rows)))


def _padded(dim: int) -> int:
    return max(16, _power_of_2(dim))


def _power_of_2(number: int) -> int:
    """The next one that is not below."""
    return 1 << (number - 1).bit_length()
