"""Attention on a CPU over queries, keys and values as one product wrote them: what passes/cpu_heads.py puts there.

B texts of S tokens, H heads of D, X = 3 H D, C = H D; T the tokens of a packed batch.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F

from paceline.fusion.heads import Heads, without_padding
from paceline.fusion.packing import Packed, pack, unpack
from paceline.host import read_cpu

# Where products compute attention, scores in memory at a time: 2 MB. 2**18 are slower at most shapes from 8x32 to 4x512
# (12 heads of 32), and more of them only at some.
SOME_SCORES = 1 << 20
MOST_SCORES = 1 << 22  # of one text
FEWEST_SCORES = 1 << 16  # below it torch's own is as fast: one text of 64 tokens


def attend_joined(qkv_BSX: torch.Tensor, mask: torch.Tensor | None, heads: Heads) -> torch.Tensor:
    """[B, S, C]: attend() of the three thirds of qkv (fusion/heads.py)."""
    batch, length, width = qkv_BSX.shape
    if _by_products(qkv_BSX, mask, heads):
        return _attend_by_products(qkv_BSX, mask, heads)
    q, k, v = qkv_BSX.view(batch, length, 3, heads.queries, -1).permute(2, 0, 3, 1, 4).unbind(0)
    y_BHSD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=heads.causal, scale=heads.scale)
    return y_BHSD.transpose(1, 2).reshape(batch, length, width // 3)


def attend_joined_packed(qkv_TX: torch.Tensor, mask: torch.Tensor | None, heads: Heads, packed: Packed) -> torch.Tensor:
    """[T, C]: the tokens' rows of attend_joined() of the padded batch."""
    return pack(attend_joined(unpack(qkv_TX, packed), without_padding(mask, packed), heads), packed)


@functools.cache
def products_pay() -> bool:
    """Whether bfloat16 attention is faster as products through oneDNN than as torch's own, whose products run through
    MKL: 1.8 against 3.6 ms at 8x128 on a CPU with AVX-512's bfloat16 and no tiles (AMD EPYC, 2 threads). With tiles
    torch's own are oneDNN's too."""
    isa = read_cpu().isa
    return "avx512_bf16" in isa and "amx_bf16" not in isa and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def _by_products(qkv_BSX: torch.Tensor, mask: torch.Tensor | None, heads: Heads) -> bool:
    batch, length, _ = qkv_BSX.shape
    of_one = heads.queries * length * length
    if qkv_BSX.dtype != torch.bfloat16 or heads.causal or of_one > MOST_SCORES or batch * of_one < FEWEST_SCORES:
        return False
    # A text without any key gets zeros from torch, and products would make NaN of it.
    return products_pay() and (mask is None or (mask.shape[1:3] == (1, 1) and not _masks_all(mask)))


def _masks_all(mask_B11S: torch.Tensor) -> bool:
    return bool((mask_B11S.amax(-1) == float("-inf")).any())


def _attend_by_products(qkv_BSX: torch.Tensor, mask_B11S: torch.Tensor | None, heads: Heads) -> torch.Tensor:
    """As many texts at a time as SOME_SCORES allows. Scores are rounded to bfloat16, which torch's own are not: over
    400 sentences MiniLM's embeddings are as near to float32's (least cosine 0.99991 both)."""
    batch, length, width = qkv_BSX.shape
    count, size = heads.queries, width // 3 // heads.queries
    scale = size**-0.5 if heads.scale is None else heads.scale
    some = min(batch, max(1, SOME_SCORES // (count * length * length)))
    memory = qkv_BSX.new_empty(some * count, length, length)
    y_BSHD = qkv_BSX.new_empty(batch, length, count, size)
    for start in range(0, batch, some):
        part = qkv_BSX[start : start + some].view(-1, length, 3, count, size).permute(2, 0, 3, 1, 4)
        texts = part.shape[1]
        q, k, v = part.reshape(3, texts * count, length, size).unbind(0)
        scores = memory[: texts * count]
        torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=scale, out=scores)
        if mask_B11S is not None:
            scores.view(texts, count, length, length).add_(mask_B11S[start : start + some])
        torch.softmax(scores, -1, out=scores)
        y_BSHD[start : start + some] = torch.bmm(scores, v).view(texts, count, length, size).transpose(1, 2)
    return y_BSHD.flatten(2)
