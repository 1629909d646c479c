"""Causal self-attention over a paged KV cache: multi-head, grouped-query and multi-query alike.

Shapes: T tokens, H query heads, K key-value heads, D head dim, M hidden size.
"""

from __future__ import annotations

import torch
from torch import nn

from paceline.config import AttentionConfig
from paceline.inputs import AttentionMetadata, KVLayer
from paceline.kernels.attention import paged_attention
from paceline.kernels.kv_write import write_kv
from paceline.kernels.rotary import apply_rotary
from paceline.layers.linear import Linear
from paceline.layers.norm import RMSNorm


class Attention(nn.Module):
    """`out(attention(rope(norm(q)), rope(norm(k)), v))`; q, k and v are one fused projection, in that order of rows.

    `q_norm` and `k_norm` (over each head) are there when `config.qk_norm` is.
    """

    def __init__(
        self,
        config: AttentionConfig,
        qkv: Linear,
        out: Linear,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.qkv = qkv
        self.out = out
        self.q_norm = q_norm
        self.k_norm = k_norm

    def forward(
        self,
        x_TM: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        kv: KVLayer,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """[T, M] -> [T, M]. Writes the tokens' keys and values into `kv` before attending, so that they see themselves.

        `rotary`: cosines and sines of the tokens' positions, [T, rotated dims] each.
        """
        config = self.config
        H, K = config.num_heads, config.num_kv_heads
        qkv_TXD = self.qkv(x_TM).view(x_TM.shape[0], H + 2 * K, config.head_dim)
        cos_TD, sin_TD = rotary
        if self.q_norm is None or self.k_norm is None:
            # Queries and keys turn alike: one call for both, since each small operation costs 2.5 us of host time.
            qk_TXD = apply_rotary(qkv_TXD[:, : H + K], cos_TD, sin_TD)
            q_THD, k_TKD = qk_TXD[:, :H], qk_TXD[:, H:]
        else:
            q_THD = apply_rotary(self.q_norm(qkv_TXD[:, :H]), cos_TD, sin_TD)
            k_TKD = apply_rotary(self.k_norm(qkv_TXD[:, H : H + K]), cos_TD, sin_TD)
        write_kv(k_TKD, qkv_TXD[:, H + K :], kv, metadata.groups[kv.group].slot_mapping_T)
        attended_THD = paged_attention(q_THD, kv, metadata, scale=config.scale, soft_cap=config.soft_cap)
        hidden_TM: torch.Tensor = self.out(attended_THD.flatten(1))
        return hidden_TM

    def extra_repr(self) -> str:
        config = self.config
        return f"{config.num_heads} heads, {config.num_kv_heads} kv heads of {config.head_dim}"
