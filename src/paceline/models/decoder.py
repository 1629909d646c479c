"""THE decoder: it executes a DecoderConfig. There is one forward for every family.

Shapes: T tokens of the step (a ragged batch of prefill chunks and decodes), D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import nn

from paceline.config import DecoderConfig, KVGroup, MoeConfig
from paceline.formats.streamed import StreamedTable
from paceline.inputs import AttentionMetadata, KVLayer, ModelInputs
from paceline.kernels.add_norm import in_place_refusal
from paceline.kernels.choices import Choice, either
from paceline.kernels.embed import embed, embed_refusal
from paceline.kernels.gpu import triton_refusal
from paceline.kernels.scaled_linear import ScaledRows
from paceline.layers.attention import Attention
from paceline.layers.embedding import Embedding
from paceline.layers.linear import Linear
from paceline.layers.mlp import GatedMLP, PlainMLP
from paceline.layers.moe import MoE
from paceline.layers.norm import Norm, Unadded
from paceline.layers.rotary import Rotary


class Parts(Protocol):
    """Where a decoder's tensors come from, by our names (models/load.py reads them from a checkpoint, one at a time).

    A fused tensor's `rows` are those of its parts, in order.
    """

    dtype: torch.dtype
    device: torch.device

    def tensor(self, name: str, *shape: int) -> torch.Tensor: ...

    def linear(self, name: str, rows: tuple[int, ...], columns: int, *, bias: bool = False) -> Linear: ...

    def table(self, name: str, rows: int, columns: int) -> torch.Tensor | StreamedTable: ...

    def tied(self, table_VD: torch.Tensor | StreamedTable) -> Linear: ...


def build_norm(config: DecoderConfig, parts: Parts, name: str, size: int, *, bias: bool | None = None) -> Norm:
    has_bias = config.norm.bias if bias is None else bias
    bias_C = parts.tensor(f"{name}.bias", size) if has_bias else None
    return Norm(config.norm, parts.tensor(f"{name}.weight", size), bias_C)


def build_attention(config: DecoderConfig, parts: Parts, name: str) -> Attention:
    a, hidden = config.attention, config.hidden_size
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    q_norm = k_norm = None
    if a.qk_norm is not None:
        over = (a.head_dim, a.head_dim) if a.qk_norm == "head" else (queries, keys)
        q_norm, k_norm = (
            build_norm(config, parts, f"{name}.{which}_norm", size, bias=False)
            for which, size in zip("qk", over, strict=True)
        )
    return Attention(
        a,
        parts.linear(f"{name}.qkv", (queries, keys, keys), hidden, bias=a.qkv_bias),
        parts.linear(f"{name}.out", (hidden,), queries, bias=a.out_bias),
        q_norm,
        k_norm,
        device=parts.device,
    )


def build_mlp(config: DecoderConfig, parts: Parts, name: str) -> nn.Module:
    m, hidden, inner = config.mlp, config.hidden_size, config.mlp.intermediate_size
    if m.gated:
        gate_up = parts.linear(f"{name}.gate_up", (inner, inner), hidden, bias=m.bias)
        return GatedMLP(m.activation, gate_up, parts.linear(f"{name}.down", (hidden,), inner, bias=m.bias))
    up = parts.linear(f"{name}.up", (inner,), hidden, bias=m.bias)
    return PlainMLP(m.activation, up, parts.linear(f"{name}.down", (hidden,), inner, bias=m.bias))


def build_moe(config: DecoderConfig, moe: MoeConfig, parts: Parts, name: str) -> MoE:
    hidden, inner = config.hidden_size, moe.intermediate_size

    def expert(e: int) -> GatedMLP:
        gate_up = parts.linear(f"{name}.experts.{e}.gate_up", (inner, inner), hidden)
        return GatedMLP(config.mlp.activation, gate_up, parts.linear(f"{name}.experts.{e}.down", (hidden,), inner))

    router_ED = parts.tensor(f"{name}.router.weight", moe.num_experts, hidden)
    return MoE(moe, router_ED, [expert(e) for e in range(moe.num_experts)])


class Block(nn.Module):
    """One layer: norm, attention, add; norm, MLP or experts, add; in the order that `config.residual` says."""

    def __init__(self, config: DecoderConfig, layer: int, parts: Parts) -> None:
        super().__init__()
        name = f"blocks.{layer}"
        r, moe = config.residual, config.moe

        def norm(which: str) -> Norm:
            return build_norm(config, parts, f"{name}.{which}", config.hidden_size)

        self.residual = r
        # Then the sums are part of the last projections, and a kernel that has one saves an operation.
        self.adds_in_projection = r.multiplier == 1.0 and not r.post_norms
        self.attention_norm = norm("attention_norm") if r.pre_norms else None
        self.attention = build_attention(config, parts, f"{name}.attention")
        self.post_attention_norm = norm("post_attention_norm") if r.post_norms else None
        self.mlp_norm = norm("mlp_norm") if r.pre_norms and not r.shared_norm else None
        # Where a projection's kernel takes fewer rows, the norm after it adds, if that alone reads the sum.
        self.adds_in_norm = self.adds_in_projection and self.mlp_norm is not None and not r.parallel
        self.mlp: nn.Module
        if moe is not None and config.is_moe(layer):
            self.mlp = build_moe(config, moe, parts, f"{name}.mlp")
        else:
            self.mlp = build_mlp(config, parts, f"{name}.mlp")
        self.post_mlp_norm = norm("post_mlp_norm") if r.post_norms else None

    def forward(
        self,
        x: torch.Tensor | Unadded,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        kv: KVLayer,
        metadata: AttentionMetadata,
    ) -> torch.Tensor | Unadded:
        r, attention, mlp = self.residual, self.attention, self.mlp
        inner_TD, x_TD, norm = _open(x, self.attention_norm, attention)
        if r.shared_norm and norm is not None:  # once, for both
            inner_TD, norm = norm(x_TD), None
        adds = self._adds(attention, x_TD)
        attended_TD = attention(inner_TD, rotary, kv, metadata, norm=norm, residual_TM=x_TD if adds else None)
        joined = attended_TD if adds else self._join(x_TD, attended_TD, self.post_attention_norm)
        opened_TD, joined_TD, norm = _open(joined, self.mlp_norm, mlp)
        if not r.shared_norm:
            inner_TD = x_TD if r.parallel else opened_TD
        adds = self._adds(mlp, joined_TD)
        mixed_TD: torch.Tensor = mlp(inner_TD, norm=norm, residual_TD=joined_TD if adds else None)
        return mixed_TD if adds else self._join(joined_TD, mixed_TD, self.post_mlp_norm)

    def norms_inside(self, rows: int, dtype: torch.dtype, device: torch.device) -> Iterator[Norm]:
        """The norms that are part of the kernel of the projection after them."""
        pairs = [(self.mlp_norm, self.mlp)]
        if not self.residual.shared_norm:
            pairs.insert(0, (self.attention_norm, self.attention))
        for norm, half in pairs:
            linear, _ = _ends(half)
            if norm is not None and linear is not None and linear.takes(norm, rows, dtype, device):
                yield norm

    def _adds(self, half: nn.Module, x_TD: torch.Tensor) -> bool:
        """Whether a half adds the residual itself."""
        if not self.adds_in_norm or in_place_refusal(x_TD) is not None:
            return self.adds_in_projection
        _, last = _ends(half)
        return last is None or last.adds(x_TD)

    def _join(self, x_TD: torch.Tensor, half_TD: torch.Tensor, norm: Norm | None) -> torch.Tensor | Unadded:
        """The residual stream with one half's answer, which may have a norm of its own, or be added by the next."""
        if self.adds_in_norm:
            return Unadded(x_TD, half_TD)
        return torch.add(x_TD, half_TD if norm is None else norm(half_TD), alpha=self.residual.multiplier)


def _ends(half: nn.Module) -> tuple[Linear | None, Linear | None]:
    """A half's first projection and its last; a mixture has several, and adds the residual after all of them."""
    if isinstance(half, Attention):
        return half.qkv, half.out
    if isinstance(half, GatedMLP):
        return half.gate_up, half.down
    return (half.up, half.down) if isinstance(half, PlainMLP) else (None, None)


def _open(
    x: torch.Tensor | Unadded, norm: Norm | None, half: nn.Module
) -> tuple[torch.Tensor | ScaledRows, torch.Tensor, Norm | None]:
    """What `half` reads, the residual stream beside it, and the norm that its first projection has yet to do."""
    if not isinstance(x, Unadded):
        return x, x, norm
    assert norm is not None
    first, _ = _ends(half)
    scales = first is not None and first.scales(x.x_TC)
    normed_TD, sum_TD = norm.scaled_of_sum(x) if scales else norm.of_sum(x)
    return normed_TD, sum_TD, None


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
        hidden, offset = config.hidden_size, config.learned_position_offset
        table_VD = parts.table("embedding.weight", config.vocab_size, hidden)
        self.embedding = Embedding(table_VD, config.embedding_scale)
        self.positions = None
        if offset is not None:
            self.positions = Embedding(parts.tensor("positions.weight", config.max_position + offset, hidden))
        self.embedding_norm = build_norm(config, parts, "embedding_norm", hidden) if config.embedding_norm else None
        self.blocks = nn.ModuleList(block(config, layer, parts) for layer in range(config.num_layers))
        self.norm = build_norm(config, parts, "norm", hidden)
        if config.tie_embeddings:
            self.head = parts.tied(table_VD)
        else:
            self.head = parts.linear("head", (config.vocab_size,), hidden)
        ropes = [config.rope_of(layer) for layer in range(config.num_layers)]
        distinct = list(dict.fromkeys(rope for rope in ropes if rope is not None))
        self.rotaries = nn.ModuleList(Rotary(rope, self.dtype, self.device) for rope in distinct)
        self.angles = [rope.angles for rope in self.rotaries if isinstance(rope, Rotary)]
        self.rotary_of_layer = tuple(None if rope is None else distinct.index(rope) for rope in ropes)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        return self.config.kv_groups

    def choices(self, rows: int) -> Iterator[Choice]:
        """What each part runs in a decode of so many requests, and why nothing better."""
        where = (rows, self.dtype, self.device)
        streamed = isinstance(self.embedding.table_VD, StreamedTable)
        refusal = "the table is offloaded" if streamed else triton_refusal(self.device, self.dtype)
        yield Choice("embedding, rotary angles", *either(refusal, "Triton, one kernel", "torch, an operation each"))
        inside = {norm for block in self.blocks if isinstance(block, Block) for norm in block.norms_inside(*where)}
        for name, module in self.named_modules():
            if ".attention." in name or ".experts" in name:  # told by the attention and the mixture themselves
                continue
            if isinstance(module, MoE):
                yield from module.choices(self.dtype, self.device)
            elif module in inside:
                yield Choice("norm", "in the product after it")
            elif isinstance(module, (Norm, Attention)):
                yield from module.choices(rows, self.dtype, self.device)
            elif isinstance(module, Linear):
                yield from module.choices(rows, self.dtype, self.device, name.rpartition(".")[2])

    def forward(self, inputs: ModelInputs, kv: Sequence[KVLayer]) -> torch.Tensor:
        """The hidden states after the final norm, [T, D] in the model's dtype. `kv`: one a layer, written in place."""
        x_TD, rotaries = self.embed(inputs)
        hidden_TD: torch.Tensor = self.norm(self.run_blocks(x_TD, rotaries, inputs, kv))
        return hidden_TD

    def embed(self, inputs: ModelInputs) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """What the first block gets, [T, D], and each rotary's cosines and sines."""
        x_TD, rotaries = self._look_up(inputs)
        if self.positions is not None:
            x_TD = x_TD + self.positions(inputs.positions_T + (self.config.learned_position_offset or 0))
        if self.embedding_norm is not None:
            x_TD = self.embedding_norm(x_TD)
        return x_TD, rotaries

    def run_blocks(
        self,
        x_TD: torch.Tensor,
        rotaries: Sequence[tuple[torch.Tensor, torch.Tensor]],
        inputs: ModelInputs,
        kv: Sequence[KVLayer],
    ) -> torch.Tensor | Unadded:
        """What the last block gives, [T, D]; x may be overwritten."""
        x: torch.Tensor | Unadded = x_TD
        for block, rotary, layer_kv in zip(self.blocks, self.rotary_of_layer, kv, strict=True):
            x = block(x, None if rotary is None else rotaries[rotary], layer_kv, inputs.attention)
        return x

    def _look_up(self, inputs: ModelInputs) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """The tokens' rows, and each rotary's cosines and sines: what reads no weight but the table's rows."""
        table_VD, positions_T = self.embedding.table_VD, inputs.positions_T
        if isinstance(table_VD, StreamedTable) or table_VD.dtype != self.dtype or embed_refusal(table_VD) is not None:
            return self.embedding(inputs.token_ids_T), [rotary(positions_T) for rotary in self.rotaries]
        first = self.angles[0] if self.angles else None
        x_TD, turned = embed(inputs.token_ids_T, positions_T, table_VD, self.embedding.scale, first)
        return x_TD, [*([] if turned is None else [turned]), *(rotary(positions_T) for rotary in self.rotaries[1:])]

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Logits of the given rows, [T, V] float32. Pass only rows that choose a token: each costs V * D products."""
        logits_TV: torch.Tensor = self.head(hidden_TD).float()
        if self.config.logit_scale != 1.0:
            logits_TV = logits_TV * self.config.logit_scale
        cap = self.config.logit_soft_cap
        return logits_TV if cap is None else torch.tanh(logits_TV / cap) * cap
