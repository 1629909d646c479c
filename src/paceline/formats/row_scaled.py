"""What int8 and fp8 weights share: a byte a value, and one scale an output channel, w = q * scale.

Shapes: N rows of a matrix, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowScaledWeight:
    q_NK: torch.Tensor  # int8 or float8_e4m3fn
    scale_N: torch.Tensor  # float32
    dtype: torch.dtype  # of what it is unpacked to

    @property
    def shape(self) -> tuple[int, int]:
        return (self.q_NK.shape[0], self.q_NK.shape[1])

    @property
    def nbytes(self) -> int:
        return self.q_NK.nbytes + self.scale_N.nbytes
