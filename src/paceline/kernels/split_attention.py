"""Attention of a few queries over many keys that lie in tensors, in Triton: a decoder's step over its own keys and over
an encoder's (Flash-Decoding, Dao et al., 2023; online softmax, Milakov and Gimelshein, 2018).

Legend: B sequences, S queries of each, L keys of each, H query heads, K key/value heads, D head size; X: the queries
that share a key head, S * H / K, padded to a power of two.

Each head's keys are split over as many programs as fill the GPU, and another kernel merges their results, always in
the same order. torch's kernels for float32, and kernels/flash_attention.py, give each head one program. us of 12 heads
of 64 on an H100, by torch, by kernels/flash_attention.py and by this:

| queries, keys | float32 | float16 |
|---|---|---|
| 1, 64 | 9.3, 8.4, 2.9 | 3.3, 2.6, 2.6 |
| 1, 1,500 | 160, 174, 6.9 | 6.8, 18, 5.1 |
| 4, 1,500 | 163, 170, 8.8 | 20, 18, 8.7 |
| 4, 1,500 of 8 sequences | 170, 176, 49 | 22, 21, 48 |

The plain twin is kernels/flash_attention.py: flash_attention_ref; the kernels are in
kernels/split_attention_triton.py.
"""

from __future__ import annotations

import torch

from paceline.kernels.flash_attention import bias_kind, mask_strides
from paceline.kernels.gpu import as_bytes, gpu, launch_options

MOST_ROWS = 8  # X: with more, the matrix unit is worth its 16 rows
TILE = 4096  # products of keys' and queries' elements that a program has at once, in 4 warps
PROGRAMS = 2  # a multiprocessor
MOST_SPLITS = 64


def rows_refusal(q_BSHD: torch.Tensor, k_BLKD: torch.Tensor) -> str | None:
    """Why split_attention cannot take what kernels/flash_attention.py takes; None when it can."""
    rows = _rows(q_BSHD, k_BLKD)
    return None if rows <= MOST_ROWS else f"{rows} queries share a key head, and the kernel takes {MOST_ROWS}"


def splitting_pays(q_BSHD: torch.Tensor, k_BLKD: torch.Tensor) -> bool:
    """Whether this is faster than kernels/flash_attention.py's kernel, of queries that it takes."""
    programs = k_BLKD.shape[0] * k_BLKD.shape[2]
    return q_BSHD.element_size() == 4 or _rows(q_BSHD, k_BLKD) == 1 or 2 * programs <= gpu(q_BSHD.device).processors


def _rows(q_BSHD: torch.Tensor, k_BLKD: torch.Tensor) -> int:
    """The queries that share a key head."""
    return q_BSHD.shape[1] * (q_BSHD.shape[2] // k_BLKD.shape[2])


def split_attention(
    q_BSHD: torch.Tensor,
    k_BLKD: torch.Tensor,
    v_BLKD: torch.Tensor,
    *,
    scale: float,
    mask_BL: torch.Tensor | None = None,
    bias_BHSL: torch.Tensor | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale + bias) v, [B, S, H, D], contiguous; mask and bias as in flash_attention. Products and sums
    are in float32. `splits`: at most; if None, as fill the GPU.

    On compute capability 9.0 and up it starts while the kernel before it on the stream still runs, and waits for that
    one's end before it reads or writes.
    """
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    from triton import next_power_of_2

    from paceline.kernels.split_attention_triton import merge_kernel, split_kernel

    B, S, H, D = q_BSHD.shape
    L, K = k_BLKD.shape[1:3]
    out_BSHD = q_BSHD.new_empty(q_BSHD.shape)
    if out_BSHD.numel() == 0:
        return out_BSHD
    chip = gpu(q_BSHD.device)
    sharing = _rows(q_BSHD, k_BLKD)
    dim, rows = next_power_of_2(D), next_power_of_2(sharing)
    tile = max(1, TILE // (dim * rows))
    if splits is None:
        splits = max(1, min(MOST_SPLITS, PROGRAMS * chip.processors // (B * K)))
    tiles = -(-L // tile)
    tiles_a_split = max(1, -(-tiles // splits))
    splits = max(1, -(-tiles // tiles_a_split))
    parts = q_BSHD.new_empty((B * K, splits, rows, D + 2), dtype=torch.float32) if splits > 1 else None
    if mask_BL is not None:
        mask_BL = mask_BL.expand(B, L)
    if bias_BHSL is not None:
        bias_BHSL = bias_BHSL.expand(B, H, S, L)
    shape = {
        "BIAS": bias_kind(bias_BHSL),
        "KV_HEADS": K,
        "GROUP": H // K,
        "QUERIES": S,
        "X": rows,
        "D": D,
        "D_TILE": dim,
    }
    dependent = {"DEPENDENT": chip.dependent, **launch_options(chip.dependent)}
    split_kernel[(B * K, splits)](
        q_BSHD,
        k_BLKD,
        v_BLKD,
        out_BSHD,
        parts,
        as_bytes(mask_BL),
        as_bytes(bias_BHSL),
        L,
        tiles_a_split * tile,
        float(scale),  # Triton would compile a kernel for the integer 1
        *q_BSHD.stride()[:3],
        *k_BLKD.stride()[:3],
        *v_BLKD.stride()[:3],
        *mask_strides(mask_BL, bias_BHSL),
        N=tile,
        STAGES=3,
        num_warps=4,
        **shape,
        **dependent,
    )
    if parts is not None:
        merge_kernel[(B * K, sharing)](
            parts, out_BSHD, splits, SPLITS=next_power_of_2(splits), num_warps=4, **shape, **dependent
        )
    return out_BSHD
