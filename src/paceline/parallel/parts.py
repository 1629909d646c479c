"""A rank's part of a checkpoint, as the decoder asks for it: the model's code is the same on one device and on many.

Values are cut as they are read and packed afterwards, so that every format is split alike. int8 and fp8 have a scale
a row: the same numbers where rows are split, finer ones where columns are. int4's groups of columns are those of the
whole matrix where a rank has whole tiles of them, multiples of 512 columns, and else maybe smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from paceline.config import DecoderConfig
from paceline.formats.dense import DenseWeight
from paceline.formats.streamed import StreamedTable
from paceline.kernels.alibi import alibi_slopes
from paceline.layers.attention import Attention
from paceline.layers.linear import Linear
from paceline.layers.moe import MoE
from paceline.models.decoder import Block, Decoder, Parts
from paceline.models.load import CheckpointParts, Cut
from paceline.parallel.communicator import Communicator
from paceline.parallel.linear import ReducedMoE, RowParallel, VocabParallel
from paceline.parallel.split import Rank, kv_heads_of, layers_of, local_config, share, vocabulary_of
from paceline.parallel.stage import Stage


class RankParts:
    """The Parts of `communicator.rank`. `config` is the whole model's, and so are the shapes that `parts` is asked
    for; what this one is asked for are the rank's."""

    def __init__(self, parts: CheckpointParts, config: DecoderConfig, communicator: Communicator) -> None:
        self.parts = parts
        self.config = config
        self.communicator = communicator
        self.rank = communicator.rank
        self.dtype, self.device = parts.dtype, parts.device

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """Norms, routers and positions are whole."""
        return self.parts.tensor(self._whole_name(name), *shape)

    def table(self, name: str, rows: int, columns: int) -> torch.Tensor | StreamedTable:
        """Whole; a stage that looks nothing up has none."""
        if self.rank.is_first or (self.rank.is_last and self.config.tie_embeddings):
            return self.parts.table(name, rows, columns)
        return torch.empty(0, columns, dtype=self.dtype, device=self.device)

    def tied(self, table_VD: torch.Tensor | StreamedTable) -> Linear:
        if not self.rank.is_last:
            return self._nothing(table_VD.shape[1])
        if self.rank.parallel.tensor == 1:
            return self.parts.tied(table_VD)
        assert isinstance(table_VD, torch.Tensor), "offloaded models are not split"
        kept = vocabulary_of(self.config.vocab_size, self.rank)
        return self._head(self.parts.tied(table_VD[kept.start : kept.stop]))

    def linear(self, name: str, rows: tuple[int, ...], columns: int, *, bias: bool = False) -> Linear:
        name, kind, rank = self._whole_name(name), name.rpartition(".")[2], self.rank
        if name == "head" and not rank.is_last:
            return self._nothing(columns)
        if rank.parallel.tensor == 1:
            return self.parts.linear(name, rows, columns, bias=bias)
        if name == "head":
            kept = vocabulary_of(self.config.vocab_size, rank)
            return self._head(self.parts.linear(name, rows, columns, bias=bias, cut=Cut((kept,))))
        if kind in ("out", "down"):
            whole = columns * rank.parallel.tensor
            cut = Cut((range(rows[0]),), share(whole, rank))
            part = self.parts.linear(name, rows, whole, bias=bias and rank.leads, cut=cut)
            # An expert's answer is a part of a sum too, that is taken once for all of them (ReducedMoE).
            return part if ".experts." in name else RowParallel(part, self.communicator)
        if kind == "qkv":
            return self._qkv(name, columns, bias)
        if kind not in ("gate_up", "up"):
            raise ValueError(f"which part of '{name}' a rank holds is not said")
        whole_rows = tuple(count * rank.parallel.tensor for count in rows)
        cut = Cut(tuple(share(count, rank) for count in whole_rows))
        return self.parts.linear(name, whole_rows, columns, bias=bias, cut=cut)

    def _qkv(self, name: str, columns: int, bias: bool) -> Linear:
        a, heads = self.config.attention, kv_heads_of(self.config, self.rank)
        queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        own = range(heads.start * a.head_dim, heads.stop * a.head_dim)
        cut = Cut((share(queries, self.rank), own, own))
        return self.parts.linear(name, (queries, keys, keys), columns, bias=bias, cut=cut)

    def _head(self, part: Linear) -> Linear:
        return VocabParallel(part, self.communicator, self.config.vocab_size)

    def _nothing(self, columns: int) -> Linear:
        return Linear(DenseWeight(torch.empty(0, columns, dtype=self.dtype, device=self.device)))

    def _whole_name(self, name: str) -> str:
        """The whole model's name of what this rank's decoder calls `name`."""
        if not name.startswith("blocks."):
            return name
        _, layer, rest = name.split(".", 2)
        return f"blocks.{layers_of(self.config.num_layers, self.rank)[int(layer)]}.{rest}"


@dataclass(frozen=True)
class RankSplit:
    """What load_decoder takes as `split`."""

    communicator: Communicator

    def __call__(self, config: DecoderConfig, parts: CheckpointParts) -> tuple[DecoderConfig, Parts]:
        return local_config(config, self.communicator.rank), RankParts(parts, config, self.communicator)


def join(decoder: Decoder, config: DecoderConfig, communicator: Communicator) -> Decoder | Stage:
    """The rank's decoder as part of the whole model that `config` describes."""
    rank = communicator.rank
    if rank.parallel.tensor > 1:
        for block in decoder.blocks:
            assert isinstance(block, Block), "every family is described by a DecoderConfig"
            _join_heads(block.attention, config, rank)
            if isinstance(block.mlp, MoE):
                block.mlp = ReducedMoE(block.mlp, communicator)
    return decoder if rank.parallel.pipeline == 1 else Stage(decoder, config, communicator)


def _join_heads(attention: nn.Module, config: DecoderConfig, rank: Rank) -> None:
    """ALiBi's slopes follow from the number of all heads."""
    alibi = config.attention.alibi
    if alibi is not None and isinstance(attention, Attention) and attention.slopes_H is not None:
        heads = config.attention.num_heads
        own = share(heads, rank)
        slopes = alibi_slopes(heads)[own.start : own.stop]
        attention.slopes_H = torch.tensor(slopes, device=attention.slopes_H.device) * alibi
