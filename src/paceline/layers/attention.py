"""Causal self-attention over a paged KV cache: multi-head, grouped-query and multi-query alike.

Shapes: T tokens, H query heads, K key-value heads, D head dim, M hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from paceline.config import AttentionConfig
from paceline.inputs import AttentionMetadata, KVLayer
from paceline.kernels.alibi import alibi_slopes
from paceline.kernels.attention import paged_attention
from paceline.kernels.choices import Choice, either
from paceline.kernels.decode_attention import decode_refusal, fused_refusal, rope_and_attend
from paceline.kernels.kv_write import write_kv
from paceline.kernels.rope_kv import QKNorm, rope_and_write_kv, rope_refusal
from paceline.kernels.rotary import apply_rotary
from paceline.kernels.scaled_linear import ScaledRows
from paceline.kernels.varlen_attention import varlen_refusal
from paceline.layers.linear import Linear
from paceline.layers.norm import Norm


class Attention(nn.Module):
    """`out(attention(rope(norm(q)), rope(norm(k)), v))`; q, k and v are one fused projection, in that order of rows.

    `q_norm` and `k_norm` are there when `config.qk_norm` is: over each head, or over all of a token's heads together.
    """

    def __init__(
        self,
        config: AttentionConfig,
        qkv: Linear,
        out: Linear,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        *,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.config = config
        self.qkv = qkv
        self.out = out
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.qk_norm: QKNorm | None = None
        if q_norm is not None and k_norm is not None:
            self.qk_norm = QKNorm(q_norm.kind, q_norm.eps, q_norm.weight_C, k_norm.weight_C)
        self.deterministic = False  # whether every step's attention is the one for any number of queries
        self.slopes_H: torch.Tensor | None = None
        if config.alibi is not None:
            self.slopes_H = torch.tensor(alibi_slopes(config.num_heads), device=device) * config.alibi

    def forward(
        self,
        x_TM: torch.Tensor | ScaledRows,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        kv: KVLayer,
        metadata: AttentionMetadata,
        *,
        norm: Norm | None = None,
        residual_TM: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`residual + attention(norm(x))`, [T, M] -> [T, M]; without `norm` and `residual_TM` there is no such step.

        Writes the tokens' keys and values into `kv` before attending, so that they see themselves. `rotary`: cosines
        and sines of the tokens' positions, [T, rotated dims] each; None for a layer without.
        """
        config = self.config
        H, K = config.num_heads, config.num_kv_heads
        qkv_TXD = self.qkv(x_TM, norm=norm).view(x_TM.shape[0], H + 2 * K, config.head_dim)
        attended_THD = self._turn_and_attend(qkv_TXD, rotary, kv, metadata)
        hidden_TM: torch.Tensor = self.out(attended_THD.flatten(1), residual_TN=residual_TM)
        return hidden_TM

    def _turn_and_attend(
        self,
        qkv_TXD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        kv: KVLayer,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """[T, H, D]; keys, normed and turned, and values go into the cache."""
        config, group, lens_R = self.config, metadata.groups[kv.group], metadata.lens_R
        scores: dict[str, Any] = {"scale": config.scale, "soft_cap": config.soft_cap, "slopes_H": self.slopes_H}
        if lens_R is not None:
            queries = qkv_TXD.shape[0] // lens_R.shape[0]
            if fused_refusal(config.head_dim, qkv_TXD.dtype, qkv_TXD.device, queries, self.qk_norm) is None:
                return rope_and_attend(
                    qkv_TXD,
                    rotary,
                    kv,
                    group.slot_mapping_T,
                    group.block_tables_RB,
                    lens_R,
                    block_size=metadata.block_size,
                    window=group.window,
                    norm=self.qk_norm,
                    counts=metadata.counts,
                    **scores,
                )
        q_THD = self._turn_and_write(qkv_TXD, rotary, kv, group.slot_mapping_T)
        return paged_attention(q_THD, kv, metadata, **scores)

    def _turn_and_write(
        self,
        qkv_TXD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        kv: KVLayer,
        slot_mapping_T: torch.Tensor,
    ) -> torch.Tensor:
        """The queries, normed and turned, [T, H, D]; keys, likewise, and values go into the cache."""
        if rope_refusal(qkv_TXD.dtype, qkv_TXD.device) is None:
            return rope_and_write_kv(qkv_TXD, rotary, kv, slot_mapping_T, self.qk_norm)
        return self._turn_and_write_plain(qkv_TXD, rotary, kv, slot_mapping_T)

    def _turn_and_write_plain(
        self,
        qkv_TXD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        kv: KVLayer,
        slot_mapping_T: torch.Tensor,
    ) -> torch.Tensor:
        """The same, one operation after the other."""
        H, K = self.config.num_heads, self.config.num_kv_heads
        q_THD, k_TKD = qkv_TXD[:, :H], qkv_TXD[:, H : H + K]
        if self.q_norm is not None and self.k_norm is not None:
            if self.config.qk_norm == "projection":
                q_THD = self.q_norm(q_THD.flatten(1)).view(q_THD.shape)
                k_TKD = self.k_norm(k_TKD.flatten(1)).view(k_TKD.shape)
            else:
                q_THD, k_TKD = self.q_norm(q_THD), self.k_norm(k_TKD)
            if rotary is not None:
                q_THD, k_TKD = apply_rotary(q_THD, *rotary), apply_rotary(k_TKD, *rotary)
        elif rotary is not None:
            # Queries and keys turn alike: one call for both, since each small operation costs 2.5 us of host time.
            qk_TXD = apply_rotary(qkv_TXD[:, : H + K], *rotary)
            q_THD, k_TKD = qk_TXD[:, :H], qk_TXD[:, H:]
        write_kv(k_TKD, qkv_TXD[:, H + K :], kv, slot_mapping_T)
        return q_THD

    def choices(self, rows: int, dtype: torch.dtype, device: torch.device) -> list[Choice]:
        """Of a decode, in the order of `forward`, and beside its attention that of prompts."""
        where = (self.config.head_dim, dtype, device)
        refusal = decode_refusal(*where)
        attend = either(refusal, "Triton split-KV decode", "torch, planned on the host")
        prompts = either(varlen_refusal(*where), "Triton, all chunks in one launch", "torch, planned on the host")
        if self.deterministic:
            attend = prompts = either(refusal, "Triton, keys in one order", "torch, keys in one order")
        return [
            *self.qkv.choices(rows, dtype, device, "qkv"),
            self._turning(dtype, device),
            Choice(f"attention, {self.extra_repr()}", *attend),
            Choice("attention of prompts", *prompts),
            *self.out.choices(rows, dtype, device, "out"),
        ]

    def _turning(self, dtype: torch.dtype, device: torch.device) -> Choice:
        name = "norm of q and k, rotary, KV write" if self.qk_norm else "rotary, KV write"
        refusal = fused_refusal(self.config.head_dim, dtype, device, norm=self.qk_norm)
        if self.deterministic:
            refusal = "the run is deterministic"
        if rope_refusal(dtype, device) is None:
            return Choice(name, *either(refusal, "in the attention's kernel", "Triton, one kernel"))
        return Choice(name, *either(rope_refusal(dtype, device), "", "torch, an operation each"))

    def extra_repr(self) -> str:
        config = self.config
        return f"{config.num_heads} heads, {config.num_kv_heads} kv heads of {config.head_dim}"
