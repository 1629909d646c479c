"""A pipeline stage: some layers of a decoder, which get the hidden states from the stage before and hand theirs on.

A step runs through the stages one after the other. That makes room for a model and no step shorter: use tensor
parallelism for speed.

Shapes: T tokens of the step, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from paceline.config import DecoderConfig, KVGroup
from paceline.inputs import KVLayer, ModelInputs
from paceline.kernels.choices import Choice
from paceline.layers.norm import Unadded
from paceline.models.decoder import Decoder
from paceline.parallel.communicator import Communicator
from paceline.parallel.split import local_groups


class Stage(nn.Module):
    """A Model of which only the last stage's hidden states mean something, and whose logits every stage has: each
    rank chooses the tokens for itself. `config`: the whole model's."""

    def __init__(self, decoder: Decoder, config: DecoderConfig, communicator: Communicator) -> None:
        super().__init__()
        self.decoder = decoder
        self.communicator = communicator
        self.dtype, self.device = decoder.dtype, decoder.device
        self.vocab_size = config.vocab_size
        self.kv_groups: tuple[KVGroup, ...] = local_groups(config, communicator.rank)

    def choices(self, rows: int) -> Iterator[Choice]:
        yield from self.decoder.choices(rows)
        yield Choice("hidden states and logits between stages", "NCCL" if self.device.type == "cuda" else "gloo")

    def forward(self, inputs: ModelInputs, kv: Sequence[KVLayer]) -> torch.Tensor:
        """The hidden states after the final norm, [T, D]; of a stage that is not the last those after its layers."""
        decoder, rank = self.decoder, self.communicator.rank
        if rank.is_first:
            x_TD, rotaries = decoder.embed(inputs)
        else:
            tokens = inputs.token_ids_T.shape[0]
            x_TD = torch.empty(tokens, decoder.config.hidden_size, dtype=self.dtype, device=self.device)
            x_TD = self.communicator.receive(x_TD)
            rotaries = [rotary(inputs.positions_T) for rotary in decoder.rotaries]
        x = decoder.run_blocks(x_TD, rotaries, inputs, kv)
        if rank.is_last:
            last_TD: torch.Tensor = decoder.norm(x)
            return last_TD
        x_TD = x.added() if isinstance(x, Unadded) else x
        self.communicator.send_on(x_TD)
        return x_TD

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Logits of the given rows, [T, V] float32, computed by the last stage."""
        if self.communicator.rank.is_last:
            logits_TV = self.decoder.logits(hidden_TD)
        else:
            logits_TV = torch.empty(hidden_TD.shape[0], self.vocab_size, device=self.device)
        return self.communicator.from_last(logits_TV)
