"""Attention of a decode over the paged cache, in Triton: the context is split, the parts are merged (Flash-Decoding,
Dao et al., 2023; online softmax, Milakov and Gimelshein, 2018).

Legend: T tokens, H query heads, K key/value heads, R requests, B blocks of the longest table, D head size, X = H + 2 K,
F rotated elements of a head.

Everything that changes from step to step is read from device tensors, so that a captured CUDA graph stays valid: the
grid is fixed, and a program finds out on the device which keys, if any, are its own. A context is cut into as few
splits as `DecodeLaunch` allows. The program that is done last merges them, always in the same order; a context of one
split needs no merging. So a request's result follows from its own length and `DecodeLaunch`, never from its neighbours,
and is the same at every run.

The plain twins are `decode_attention_plain` and, before it, those of kernels/rope_kv.py; the slow one of both is
kernels/attention.py: paged_attention_ref. The kernel is in kernels/decode_attention_triton.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from paceline.inputs import KVLayer
from paceline.kernels.gpu import gpu, launch_options, triton_refusal
from paceline.kernels.rope_kv import QKNorm

LARGEST_HEAD = 256
MOST_SPLITS = 32
# Queries a request that one call turns and caches: their keys are not multiplied on the matrix unit.
MOST_FRESH = 8
# float32 values that the last program reads to merge: 256 KiB, 2 us for one multiprocessor.
MERGED = 1 << 16
FEWEST_ROWS = 8  # columns that the matrix unit takes
# Of a request: more than the key heads times the tiles of queries that share one, for 128 heads and 8 queries.
COUNTS = 256


@dataclass(frozen=True)
class DecodeLaunch:
    """How one decode is cut into programs. Not a function of the batch, or results would depend on it."""

    splits: int  # programs a request and key head, at most
    keys_a_tile: int  # a power of two, at least 16
    tiles_a_split: int  # at least: a context of fewer tiles than splits * tiles_a_split has fewer splits
    warps: int
    stages: int  # of the loop over tiles: tiles are asked for (stages - 1) / 2 ahead, their slots as much before
    prefetch: int  # tiles of a split, a power of two, that a dependent launch asks for before its wait
    dependent: bool  # programmatic dependent launch: it starts while the kernel before it still runs


def default_launch(rows: int, kv_heads: int, head_dim: int, itemsize: int, device: torch.device) -> DecodeLaunch:
    """For `rows` queries that share a key head, (queries a request) * H / K: a program a multiprocessor at most, and no
    more than pay for the merging.

    One multiprocessor reads some 64 KiB of keys and values in a microsecond, and merging takes 3. Measured on an H100
    in the step of an 8B, splits of 96 KiB at least are the best: with 192 a step at 512 and at 2,048 tokens takes 1.5
    to 4% longer, with 64 one at 144 tokens 1.5 to 4%. More than one tile asked for before the wait costs up to 1.4%.
    """
    chip = gpu(device)
    dim, rows_a_tile = _padded(head_dim), _rows_a_tile(rows, head_dim, itemsize)
    programs = kv_heads * -(-rows // rows_a_tile)
    most = min(MOST_SPLITS, MERGED // (min(rows, rows_a_tile) * dim))
    keys = max(16, min(128, 16384 // (dim * itemsize)))
    return DecodeLaunch(
        splits=max(1, min(most, chip.processors // programs)),
        tiles_a_split=max(1, 98304 // (2 * keys * dim * itemsize)),
        keys_a_tile=keys,
        warps=4,
        stages=5 if chip.dependent else 3,  # older GPUs have too little shared memory for two tiles on their way
        prefetch=1,
        dependent=chip.dependent,
    )


def decode_refusal(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this kernel cannot take such a cache; None when it can."""
    if head_dim > LARGEST_HEAD:
        return f"heads of {head_dim} are larger than {LARGEST_HEAD}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype is {dtype}"
    return triton_refusal(device, dtype)


def fused_refusal(
    head_dim: int, dtype: torch.dtype, device: torch.device, queries: int = 1, norm: QKNorm | None = None
) -> str | None:
    """Why `rope_and_attend` cannot take such a cache, so many queries a request or such a norm; None when it can."""
    if queries > MOST_FRESH:
        return f"{queries} queries a request are more than {MOST_FRESH}"
    if norm is not None and norm.q_weight.numel() != head_dim:
        return "all heads of a token are normed together"
    return decode_refusal(head_dim, dtype, device)


def make_counts(requests: int, device: torch.device | str) -> torch.Tensor:
    """int32 zeros, where the splits of a step of so many requests count those that are done. Zero again after each
    call: one tensor serves all calls of a stream."""
    return torch.zeros(requests * COUNTS, dtype=torch.int32, device=device)


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
    counts: torch.Tensor | None = None,
    launch: DecodeLaunch | None = None,
) -> torch.Tensor:
    """Attention of each request's last T / R tokens over its cached keys, their own included; [T, H, D], contiguous.

    `block_tables_RB` and `seq_lens_R` are int32; `q_THD` may be a slice of a wider projection, its last dimension
    contiguous. A request of length 0 is an unused row of a captured step: it reads nothing and yields zeros.
    `window`, `soft_cap` and `slopes_H` are those of `paged_attention`. Products and sums are taken in float32.
    `counts`: of make_counts(R), or of more; made for the call if None or too few.

    With `launch.dependent`, lengths and tables are read before the end of the kernel launched just before this one is
    waited for. So between their writer and this kernel there must be one that is launched without dependence, or that
    lets its successors start only when its own wait is over (kernels/embed.py). Raises ValueError where T is no
    multiple of R.
    """
    return _attend(
        q_THD,
        q_THD.shape[1],
        kv,
        block_tables_RB,
        seq_lens_R,
        counts,
        launch,
        **dict.fromkeys(("cos_ptr", "sin_ptr", "q_weight_ptr", "k_weight_ptr", "slots_ptr")),
        eps=0.0,
        FRESH=False,
        F=0,
        CENTRED=False,
        BLOCK_SIZE=block_size,
        scale=scale,
        WINDOW=window or 0,
        SOFT_CAP=soft_cap or 0.0,
        slopes_ptr=slopes_H,
    )


def rope_and_attend(
    qkv_TXD: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    kv: KVLayer,
    slot_mapping_T: torch.Tensor,
    block_tables_RB: torch.Tensor,
    seq_lens_R: torch.Tensor,
    *,
    block_size: int,
    scale: float,
    norm: QKNorm | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes_H: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    launch: DecodeLaunch | None = None,
) -> torch.Tensor:
    """rope_and_write_kv and decode_attention in one: the step's keys are turned where they are needed, and one program
    writes them into the cache. Arguments as there; `fused_refusal` says what it does not take.

    The older keys, which no kernel of this step writes, are asked for while the projection still runs.
    """
    cos_TF, sin_TF = (None, None) if rotary is None else (rotary[0].contiguous(), rotary[1].contiguous())
    return _attend(
        qkv_TXD,
        qkv_TXD.shape[1] - 2 * kv.k_HSD.shape[0],
        kv,
        block_tables_RB,
        seq_lens_R,
        counts,
        launch,
        cos_ptr=cos_TF,
        sin_ptr=sin_TF,
        q_weight_ptr=None if norm is None else norm.q_weight,
        k_weight_ptr=None if norm is None else norm.k_weight,
        slots_ptr=slot_mapping_T,
        eps=0.0 if norm is None else norm.eps,
        FRESH=True,
        F=0 if cos_TF is None else cos_TF.shape[-1],
        CENTRED=norm is not None and norm.kind == "layer",
        BLOCK_SIZE=block_size,
        scale=scale,
        WINDOW=window or 0,
        SOFT_CAP=soft_cap or 0.0,
        slopes_ptr=slopes_H,
    )


def _attend(
    q_TXD: torch.Tensor,
    heads: int,
    kv: KVLayer,
    block_tables_RB: torch.Tensor,
    seq_lens_R: torch.Tensor,
    counts: torch.Tensor | None,
    launch: DecodeLaunch | None,
    **options: Any,
) -> torch.Tensor:
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    from paceline.kernels.decode_attention_triton import attend

    tokens, _, dim = q_TXD.shape
    kv_heads, requests = kv.k_HSD.shape[0], seq_lens_R.shape[0]
    device, itemsize = q_TXD.device, q_TXD.element_size()
    out_THD = q_TXD.new_empty((tokens, heads, dim))
    if tokens == 0:
        return out_THD
    queries, group = tokens // requests, heads // kv_heads
    if queries * requests != tokens:
        raise ValueError(f"{tokens} tokens are not equally many for each of {requests} requests")
    rows = queries * group
    launch = launch or default_launch(rows, kv_heads, dim, itemsize, device)
    rows_a_tile = _rows_a_tile(rows, dim, itemsize)
    row_tiles = -(-rows // rows_a_tile)
    if counts is None or counts.numel() < requests * kv_heads * row_tiles:
        counts = torch.zeros(requests * kv_heads * row_tiles, dtype=torch.int32, device=device)
    # Allocated here: in a captured graph the layers then share one piece of the graph's pool.
    places = (requests, kv_heads * row_tiles, launch.splits)
    parts = q_TXD.new_empty((*places, rows_a_tile, dim), dtype=torch.float32)
    tops = q_TXD.new_empty((requests, kv_heads * row_tiles, 2, rows_a_tile, launch.splits), dtype=torch.float32)
    attend[(launch.splits, kv_heads * row_tiles, requests)](
        parts_ptr=parts,
        tops_ptr=tops,
        counts_ptr=counts,
        SPLITS=launch.splits,
        CHUNK=min(16, _power_of_2(launch.splits)),
        MERGED_ROWS=max(1, min(rows_a_tile, 128 * launch.warps // _padded(dim))),  # four values a thread and split
        TILES_A_SPLIT=launch.tiles_a_split,
        KEY_TILE=launch.keys_a_tile,
        QUERIES=queries,
        ROW_TILES=row_tiles,
        ROW_TILE=rows_a_tile,
        STAGES=launch.stages,
        PREFETCH=launch.prefetch,
        DEPENDENT=launch.dependent,
        num_warps=launch.warps,
        **tensor_arguments(q_TXD, kv, block_tables_RB, seq_lens_R, out_THD),
        **options,
        **launch_options(launch.dependent),
    )
    return out_THD


def tensor_arguments(
    q_TXD: torch.Tensor,
    kv: KVLayer,
    block_tables_RB: torch.Tensor,
    seq_lens_R: torch.Tensor,
    out_THD: torch.Tensor,
) -> dict[str, Any]:
    """What this kernel and that of kernels/varlen_attention.py are told of queries, cache and result."""
    _, heads, dim = out_THD.shape
    return {
        "q_ptr": q_TXD,
        "k_ptr": kv.k_HSD,
        "v_ptr": kv.v_HSD,
        "tables_ptr": block_tables_RB,
        "lens_ptr": seq_lens_R,
        "out_ptr": out_THD,
        "q_token_stride": q_TXD.stride(0),
        "q_head_stride": q_TXD.stride(1),
        "k_head_stride": kv.k_HSD.stride(0),
        "v_head_stride": kv.v_HSD.stride(0),
        "table_stride": block_tables_RB.stride(0),
        "GROUP": heads // kv.k_HSD.shape[0],
        "D": dim,
        "D_TILE": _padded(dim),
        "WIDE": max(kv.k_HSD.stride(0), kv.v_HSD.stride(0)) >= 1 << 31,
    }


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


def _rows_a_tile(rows: int, head_dim: int, itemsize: int) -> int:
    # 128 registers a thread for the sums; float32 is multiplied without the matrix unit and needs more beside them.
    most = 4096 // _padded(head_dim) if itemsize == 2 else FEWEST_ROWS
    return max(FEWEST_ROWS, min(most, _power_of_2(rows)))


def _padded(dim: int) -> int:
    return max(16, _power_of_2(dim))


def _power_of_2(number: int) -> int:
    """The next one that is not below."""
    return 1 << (number - 1).bit_length()
