"""Linear layers of which each rank has a part, and the experts of which each rank has a part.

Shapes: T tokens, K inputs, N outputs, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from paceline.kernels.choices import Choice, either
from paceline.kernels.one_shot import size_refusal
from paceline.kernels.scaled_linear import ScaledRows
from paceline.layers.linear import Linear
from paceline.layers.moe import MoE
from paceline.layers.norm import Norm
from paceline.parallel.communicator import Communicator


class RowParallel(Linear):
    """A Linear over this rank's columns of the weight: each rank's product is a part of a sum.

    One rank has the bias, and adds the residual, inside its product, where they cost no operation of their own.
    """

    def __init__(self, linear: Linear, communicator: Communicator) -> None:
        super().__init__(linear.weight, linear.bias_N)
        self.communicator = communicator

    def forward(
        self,
        x_TK: torch.Tensor | ScaledRows,
        *,
        norm: Norm | None = None,
        activation: str | None = None,
        gated: bool = False,
        residual_TN: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`residual + norm(x) @ weight.T + bias`, [T, K of this rank] -> [T, N] on every rank. No activation: one of a
        part is not a part of it. Nor a norm, which would need all of x."""
        if norm is not None or activation is not None:
            raise ValueError("a row of a sum has no norm and no activation")
        part_TN = super().forward(x_TK, residual_TN=residual_TN if self.communicator.rank.leads else None)
        return self.communicator.all_reduce(part_TN)

    def adds(self, residual_TN: torch.Tensor) -> bool:
        """Always: one rank does, before the ranks' parts are summed."""
        return True

    def choices(self, rows: int, dtype: torch.dtype, device: torch.device, name: str) -> list[Choice]:
        summing = Choice(f"sum of {name} over the ranks", "gloo")
        if device.type == "cuda":
            refusal = size_refusal(rows * self.weight.shape[0] * dtype.itemsize, dtype)
            if self.communicator.inboxes is None:
                refusal = "the GPUs do not see each other's memory"
            summing = Choice(
                summing.operation, *either(refusal, "Triton, one-shot through each other's memory", "NCCL")
            )
        return [*super().choices(rows, dtype, device, name), summing]


class VocabParallel(Linear):
    """The output head over this rank's part of the vocabulary; every rank gets the logits of all of it."""

    def __init__(self, linear: Linear, communicator: Communicator, vocab_size: int) -> None:
        super().__init__(linear.weight, linear.bias_N)
        self.communicator = communicator
        self.vocab_size = vocab_size

    def forward(
        self,
        x_TK: torch.Tensor | ScaledRows,
        *,
        norm: Norm | None = None,
        activation: str | None = None,
        gated: bool = False,
        residual_TN: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, K] -> [T, V] on every rank."""
        if activation is not None or residual_TN is not None:
            raise ValueError("the output head has no activation and no residual")
        part_TN = super().forward(x_TK, norm=norm)
        each = -(-self.vocab_size // self.communicator.rank.parallel.tensor)
        if part_TN.shape[1] < each:  # the last rank's
            part_TN = F.pad(part_TN, (0, each - part_TN.shape[1]))
        return self.communicator.gather_columns(part_TN)[:, : self.vocab_size]


class ReducedMoE(nn.Module):
    """Experts of which each rank has some inner channels: one sum for all of a layer's, after they are mixed.

    The router is whole on every rank and reads the same bits, so that all ranks send a token to the same experts.
    """

    def __init__(self, moe: MoE, communicator: Communicator) -> None:
        super().__init__()
        self.moe = moe
        self.communicator = communicator

    def forward(
        self, x_TD: torch.Tensor, *, norm: Norm | None = None, residual_TD: torch.Tensor | None = None
    ) -> torch.Tensor:
        residual_TD = residual_TD if self.communicator.rank.leads else None
        part_TD: torch.Tensor = self.moe(x_TD, norm=norm, residual_TD=residual_TD)
        return self.communicator.all_reduce(part_TD)
