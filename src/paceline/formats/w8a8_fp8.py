"""fp8 weights as formats/fp8.py packs them, multiplied by activations in fp8 wherever there are many rows of them: a
prompt's, or those of a large batch. Few rows are multiplied as in fp8, since reading the weight is all that they cost.

Where no matrix unit takes fp8 the activations are rounded all the same: the numbers do not follow the machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from paceline.formats import fp8
from paceline.formats.fp8 import FP8Weight, packing_bytes, resident_bytes, stored_bytes, unpack_bytes
from paceline.kernels.choices import either
from paceline.kernels.gemv import Planes
from paceline.kernels.linear import UNPACKED
from paceline.kernels.scaled_linear import ScaledRows, quantize_rows, round_rows, scaled_linear, scaled_refusal

__all__ = ["W8A8Weight", "pack", "packing_bytes", "resident_bytes", "stored_bytes", "unpack_bytes"]

# On an H100 the products of Llama-3.1-8B's 32 layers take 4.12 ms of 64 rows in fp8, 0.48 of them rounding, most of
# which norms and activations do by the way; as stored 4.27, and 3.41 of 32 rows.
FEW_ROWS = 32


@dataclass(frozen=True)
class W8A8Weight(FP8Weight):
    @cached_property
    def planes(self) -> Planes | None:
        planes = super().planes
        return None if planes is None else replace(planes, most_rows=FEW_ROWS)

    def matmul(self, x_TK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        if x_TK.shape[0] <= FEW_ROWS:
            return super().matmul(x_TK, bias_N)
        if self._refusal is None:
            return self.matmul_scaled(quantize_rows(x_TK), bias_N)
        return super().matmul(round_rows(x_TK), bias_N)

    def scales(self, rows: int) -> bool:
        """Whether matmul of so many rows is matmul_scaled of what it rounds them to."""
        return rows > FEW_ROWS and self._refusal is None

    def matmul_scaled(self, x: ScaledRows, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        return scaled_linear(x, self.q_NK, self.scale_N, bias_N)

    def route(self, rows: int) -> tuple[str, str]:
        if rows <= FEW_ROWS:
            return super().route(rows)
        return either(self._refusal, "torch's _scaled_mm, activations in fp8", f"rounded, {UNPACKED}")

    @cached_property
    def _refusal(self) -> str | None:
        return scaled_refusal(self.shape, self.dtype, self.q_NK.device)


def pack(values_NK: torch.Tensor) -> W8A8Weight:
    packed = fp8.pack(values_NK)
    return W8A8Weight(packed.q_NK, packed.scale_N, packed.dtype)
