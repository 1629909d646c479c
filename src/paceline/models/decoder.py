"""THE decoder: it executes a DecoderConfig. There is one forward for every family.

Shapes: T tokens of the step (a ragged batch of prefill chunks and decodes), D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from paceline.config import DecoderConfig
from paceline.inputs import AttentionMetadata, KVLayer, ModelInputs
from paceline.layers.attention import Attention
from paceline.layers.embedding import Embedding
from paceline.layers.linear import Linear
from paceline.layers.mlp import MLP
from paceline.layers.norm import RMSNorm
from paceline.layers.rotary import Rotary


class Parts(Protocol):
    """Where a decoder's tensors come from, by our names (models/load.py reads them from a checkpoint, one at a time).

    A fused tensor's `rows` are those of its parts, in order.
    """

    dtype: torch.dtype
    device: torch.device

    def tensor(self, name: str, *shape: int) -> torch.Tensor: ...

    def linear(self, name: str, rows: tuple[int, ...], columns: int, *, bias: bool = False) -> Linear: ...

    def tied(self, table_VD: torch.Tensor) -> Linear: ...


class Block(nn.Module):
    """One layer: norm, attention, add; norm, MLP, add. With `residual.post_norms` a norm follows attention and MLP."""

    def __init__(self, config: DecoderConfig, layer: int, parts: Parts) -> None:
        super().__init__()
        name = f"blocks.{layer}"
        hidden, sandwich = config.hidden_size, config.residual.post_norms

        def norm(which: str, size: int = hidden) -> RMSNorm:
            return RMSNorm(parts.tensor(f"{name}.{which}.weight", size), config.norm)

        a = config.attention
        queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        self.attention_norm = norm("attention_norm")
        self.attention = Attention(
            a,
            parts.linear(f"{name}.attention.qkv", (queries, keys, keys), hidden, bias=a.qkv_bias),
            parts.linear(f"{name}.attention.out", (hidden,), queries, bias=a.out_bias),
            norm("attention.q_norm", a.head_dim) if a.qk_norm else None,
            norm("attention.k_norm", a.head_dim) if a.qk_norm else None,
        )
        self.post_attention_norm = norm("post_attention_norm") if sandwich else None
        m = config.mlp
        inner = m.intermediate_size
        self.mlp_norm = norm("mlp_norm")
        self.mlp = MLP(
            m,
            parts.linear(f"{name}.mlp.gate_up", (inner, inner), hidden, bias=m.bias),
            parts.linear(f"{name}.mlp.down", (hidden,), inner, bias=m.bias),
        )
        self.post_mlp_norm = norm("post_mlp_norm") if sandwich else None

    def forward(
        self,
        x_TD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        kv: KVLayer,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        attended_TD = self.attention(self.attention_norm(x_TD), rotary, kv, metadata)
        if self.post_attention_norm is not None:
            attended_TD = self.post_attention_norm(attended_TD)
        x_TD = x_TD + attended_TD
        mixed_TD: torch.Tensor = self.mlp(self.mlp_norm(x_TD))
        if self.post_mlp_norm is not None:
            mixed_TD = self.post_mlp_norm(mixed_TD)
        return x_TD + mixed_TD


class Decoder(nn.Module):
    """A decoder-only transformer. Build it with models/load.py: load_decoder."""

    def __init__(
        self,
        config: DecoderConfig,
        parts: Parts,
        block: Callable[[DecoderConfig, int, Parts], nn.Module] = Block,
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype, self.device = parts.dtype, parts.device
        table_VD = parts.tensor("embedding.weight", config.vocab_size, config.hidden_size)
        self.embedding = Embedding(table_VD, config.embedding_scale)
        self.blocks = nn.ModuleList(block(config, layer, parts) for layer in range(config.num_layers))
        self.norm = RMSNorm(parts.tensor("norm.weight", config.hidden_size), config.norm)
        if config.tie_embeddings:
            self.head = parts.tied(table_VD)
        else:
            self.head = parts.linear("head", (config.vocab_size,), config.hidden_size)
        ropes = [config.rope_of(layer) for layer in range(config.num_layers)]
        distinct = list(dict.fromkeys(ropes))
        self.rotaries = nn.ModuleList(Rotary(rope, self.dtype, self.device) for rope in distinct)
        self.rotary_of_layer = tuple(distinct.index(rope) for rope in ropes)

    def forward(self, inputs: ModelInputs, kv: Sequence[KVLayer]) -> torch.Tensor:
        """The hidden states after the final norm, [T, D] in the model's dtype. `kv`: one a layer, written in place."""
        rotaries = [rotary(inputs.positions_T) for rotary in self.rotaries]
        x_TD = self.embedding(inputs.token_ids_T)
        for block, rotary, layer_kv in zip(self.blocks, self.rotary_of_layer, kv, strict=True):
            x_TD = block(x_TD, rotaries[rotary], layer_kv, inputs.attention)
        hidden_TD: torch.Tensor = self.norm(x_TD)
        return hidden_TD

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Logits of the given rows, [T, V] float32. Pass only rows that choose a token: each costs V * D products."""
        logits_TV: torch.Tensor = self.head(hidden_TD).float()
        cap = self.config.logit_soft_cap
        return logits_TV if cap is None else torch.tanh(logits_TV / cap) * cap
