"""Attention over the paged cache (Kwon et al., 2023), for a ragged batch of prefill chunks, drafts and decodes.

Legend: T tokens, H query heads, K key/value heads, G = H / K, D head size, R requests, L keys, Q queries.

`paged_attention` follows the step's plan; `paged_attention_ref` is its slow twin, a loop over single queries.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from paceline.inputs import AttentionMetadata, KVLayer, Segment
from paceline.kernels.decode_attention import decode_attention, decode_attention_plain
from paceline.kernels.varlen_attention import mixed_attention, varlen_attention_plain
from paceline.sizing import SCORE_BYTES

# On CUDA, without cuDNN's attention: it builds a plan for every new number of keys, 50 ms each on an H100, and a
# growing context has a new number at every token.
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Scores:
    """How scores follow from queries and keys, before the mask."""

    scale: float
    soft_cap: float | None
    slopes_H: torch.Tensor | None

    def alibi(self, kv_heads: int, num_keys: int) -> torch.Tensor:
        """[K, G, L] float32: minus slope times distance, counted from the last key. A query further back sees all its
        keys shifted by the same constant, which the softmax does not notice."""
        assert self.slopes_H is not None
        distances_L = torch.arange(1 - num_keys, 1, device=self.slopes_H.device)
        return (self.slopes_H[:, None] * distances_L).view(kv_heads, -1, num_keys)


def paged_attention(
    q_THD: torch.Tensor,
    kv: KVLayer,
    metadata: AttentionMetadata,
    *,
    scale: float,
    soft_cap: float | None = None,
    slopes_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each query over its request's cached keys, its own included; [T, H, D] like `q_THD`.

    The keys of the step's own tokens must have been written (kernels/kv_write.py). `soft_cap` c bounds scores to
    c * tanh(score / c) before the mask; `slopes_H` (float32, kernels/alibi.py) times the distance is taken from them.
    """
    group = metadata.groups[kv.group]
    tables_RB = group.block_tables_RB
    options: dict[str, Any] = {
        "block_size": metadata.block_size,
        "scale": scale,
        "window": group.window,
        "soft_cap": soft_cap,
        "slopes_H": slopes_H,
    }
    if metadata.ragged is not None:
        if q_THD.is_cuda:
            return mixed_attention(q_THD, kv, tables_RB, metadata.ragged, counts=metadata.counts, **options)
        return varlen_attention_plain(q_THD, kv, tables_RB, metadata.ragged, **options)
    if metadata.lens_R is not None:
        if q_THD.is_cuda:
            return decode_attention(q_THD, kv, tables_RB, metadata.lens_R, counts=metadata.counts, **options)
        return decode_attention_plain(q_THD, kv, tables_RB, metadata.lens_R, **options)
    scores = Scores(scale, soft_cap, slopes_H)
    segments = group.segments
    if len(segments) == 1 and isinstance(segments[0].queries, slice):  # one stream: no output buffer to fill
        return _attend(q_THD, kv, segments[0], metadata.block_size, scores)
    out_THD = torch.empty_like(q_THD)
    for segment in segments:
        out_THD[segment.queries] = _attend(q_THD[segment.queries], kv, segment, metadata.block_size, scores)
    return out_THD


def _attend(
    q_QHD: torch.Tensor,
    kv: KVLayer,
    segment: Segment,
    block_size: int,
    scores: Scores,
) -> torch.Tensor:
    keys = segment.keys if isinstance(segment.keys, slice) else _rows(segment.keys, kv.k_HSD, block_size)
    k_KLD = _read(kv.k_HSD, keys, segment, block_size)
    v_KLD = _read(kv.v_HSD, keys, segment, block_size)
    lone_decode = q_QHD.shape[0] == 1 and segment.mask is None
    if segment.num_requests > 1 or (lone_decode and q_QHD.is_cuda):
        return _batch(q_QHD, k_KLD, v_KLD, segment, scores)
    if scores.soft_cap is not None or scores.slopes_H is not None:
        return _explicit(q_QHD, k_KLD, v_KLD, segment, scores)
    if lone_decode:
        return _decode_one(q_QHD, k_KLD, v_KLD, scores.scale)
    with sdpa_kernel(SDPA_BACKENDS) if q_QHD.is_cuda else nullcontext():
        out_HQD = F.scaled_dot_product_attention(
            q_QHD.transpose(0, 1)[None],
            k_KLD[None],
            v_KLD[None],
            attn_mask=segment.mask,
            is_causal=segment.causal,
            scale=scores.scale,
            enable_gqa=q_QHD.shape[1] != k_KLD.shape[0],
        )[0]
    return out_HQD.transpose(0, 1)


def _rows(block_ids: torch.Tensor, cache_KSD: torch.Tensor, block_size: int) -> torch.Tensor:
    """[K, blocks]: where each head's share of each block lies, when the cache is seen as rows of a block a head.

    An embedding look-up then copies rows on all threads; index_select over the middle dimension copies one by one
    (16 requests of 144 tokens, keys and values: 310 us a layer against 540).
    """
    heads, slots, _ = cache_KSD.shape
    return (
        block_ids + torch.arange(0, heads * slots // block_size, slots // block_size, device=block_ids.device)[:, None]
    )


def _read(cache_KSD: torch.Tensor, keys: slice | torch.Tensor, segment: Segment, block_size: int) -> torch.Tensor:
    """Keys or values of a segment: [K, L, D], or [K, R * L, D] for a batch. A view where the blocks are consecutive."""
    if isinstance(keys, slice):
        return cache_KSD[:, keys]
    heads, _, dim = cache_KSD.shape
    read_KLD = F.embedding(keys, cache_KSD.view(-1, block_size * dim)).view(heads, -1, dim)
    return read_KLD if segment.num_requests > 1 else read_KLD[:, : segment.num_keys]


def _decode_one(q_1HD: torch.Tensor, k_KLD: torch.Tensor, v_KLD: torch.Tensor, scale: float) -> torch.Tensor:
    # The G queries of a head go in as G rows of one head: no key is repeated, and no mask is needed.
    q_KGD = q_1HD.view(k_KLD.shape[0], 1, -1, q_1HD.shape[2])
    out_KGD = F.scaled_dot_product_attention(q_KGD, k_KLD[:, None], v_KLD[:, None], scale=scale)
    return out_KGD.reshape(q_1HD.shape)


def _batch(
    q_THD: torch.Tensor,
    k_KLD: torch.Tensor,
    v_KLD: torch.Tensor,
    segment: Segment,
    scores: Scores,
) -> torch.Tensor:
    """R requests with Q queries each; the queries that share a key head go in as Q * G rows of it."""
    # Plain products: at 16 decodes of 128 tokens on 2 CPU threads 210 us a layer against 290 us through SDPA.
    kv_heads, _, dim = k_KLD.shape
    num = segment.num_requests
    queries, group = q_THD.shape[0] // num, q_THD.shape[1] // kv_heads
    q_KRQGD = q_THD.view(num, queries, kv_heads, group, dim).permute(2, 0, 1, 3, 4)
    k_KRLD = k_KLD.view(kv_heads, num, -1, dim)
    v_KRLD = v_KLD.view(kv_heads, num, -1, dim)
    scores_KRXL = torch.matmul((q_KRQGD * scores.scale).flatten(2, 3), k_KRLD.transpose(2, 3))
    if scores.soft_cap is not None:
        scores_KRXL = scores.soft_cap * torch.tanh(scores_KRXL / scores.soft_cap)
    if scores.slopes_H is not None:
        # In float32: bfloat16 has 8 bits, and a slope of 1/2 over 1,024 keys needs 10.
        scores_KRXL = scores_KRXL.float()
        scores_KRXL.view(kv_heads, num, queries, group, -1).add_(scores.alibi(kv_heads, k_KRLD.shape[2])[:, None, None])
    if segment.bias is not None:
        scores_KRXL.view(kv_heads, num, queries, group, -1).add_(segment.bias[None, :, :, None, :])
    probs_KRXL = torch.softmax(scores_KRXL, dim=-1).to(q_THD.dtype)  # sums in float32 whatever the dtype
    out_KRQGD = torch.matmul(probs_KRXL, v_KRLD).view(kv_heads, num, queries, group, dim)
    return out_KRQGD.permute(1, 2, 0, 3, 4).reshape(q_THD.shape)


def _explicit(
    q_QHD: torch.Tensor,
    k_KLD: torch.Tensor,
    v_KLD: torch.Tensor,
    segment: Segment,
    scores: Scores,
) -> torch.Tensor:
    """One request with scores that SDPA cannot express, so many queries at a time as SCORE_BYTES allow."""
    queries, heads, dim = q_QHD.shape
    kv_heads, keys, _ = k_KLD.shape
    mask = segment.mask
    if segment.causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q_QHD.device).tril()
    out_QHD = torch.empty_like(q_QHD)
    step = max(1, SCORE_BYTES // (4 * heads * keys))
    for first in range(0, queries, step):
        rows = slice(first, first + step)
        q_KGQD = q_QHD[rows].reshape(-1, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)
        scores_KGQL = torch.matmul(q_KGQD, k_KLD[:, None].transpose(2, 3)).float() * scores.scale
        if scores.soft_cap is not None:
            scores_KGQL = scores.soft_cap * torch.tanh(scores_KGQL / scores.soft_cap)
        if scores.slopes_H is not None:
            scores_KGQL += scores.alibi(kv_heads, keys)[:, :, None]
        if mask is not None:
            scores_KGQL.masked_fill_(~mask[rows], float("-inf"))
        probs_KGQL = torch.softmax(scores_KGQL, dim=-1).to(q_QHD.dtype)
        out_QHD[rows] = torch.matmul(probs_KGQL, v_KLD[:, None]).permute(2, 0, 1, 3).reshape(-1, heads, dim)
    return out_QHD


def paged_attention_ref(
    q_THD: torch.Tensor,
    kv: KVLayer,
    metadata: AttentionMetadata,
    *,
    scale: float,
    soft_cap: float | None = None,
    slopes_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same by the definition: one query and one head at a time, keys looked up slot by slot, in float32."""
    group = metadata.groups[kv.group]
    size = metadata.block_size
    per_head = q_THD.shape[1] // kv.k_HSD.shape[0]
    out_THD = torch.empty_like(q_THD)
    for r, length in enumerate(metadata.seq_lens):
        first, end = metadata.query_starts[r], metadata.query_starts[r + 1]
        table = group.block_tables_RB[r].tolist()
        for t in range(first, end):
            position = length - (end - t)
            low = 0 if group.window is None else max(0, position - group.window + 1)
            slots = [table[p // size] * size + p % size for p in range(low, position + 1)]
            for head in range(q_THD.shape[1]):
                keys_LD = kv.k_HSD[head // per_head, slots].float()
                scores_L = keys_LD @ q_THD[t, head].float() * scale
                if soft_cap is not None:
                    scores_L = soft_cap * torch.tanh(scores_L / soft_cap)
                if slopes_H is not None:
                    scores_L = scores_L - slopes_H[head] * torch.arange(position - low, -1, -1, device=q_THD.device)
                values_LD = kv.v_HSD[head // per_head, slots].float()
                out_THD[t, head] = torch.softmax(scores_L, dim=0) @ values_LD
    return out_THD
