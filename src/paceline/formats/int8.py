"""int8 weights, one scale an output channel, symmetric: w = q * scale, q in -127..127. Round to nearest.

Few rows are multiplied as stored, on a GPU by kernels/gemv.py, on a CPU through torch's packed int8 op; more are
unpacked. Weight-only: activations stay floating point.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from paceline.formats.chunks import linear_unpacked, packing_chunks, quotient_bytes, unpacked_rows
from paceline.formats.row_scaled import RowScaledWeight
from paceline.kernels.choices import either
from paceline.kernels.gemv import Planes, byte_planes
from paceline.kernels.linear import UNPACKED
from paceline.kernels.unpack import unpack_planes, unpack_refusal

# Above this many rows torch's int8 op loses to unpacking the weight and a dense product.
MAX_PACKED_ROWS = 8
# The op reads whole vectors past the end of a shorter row: wrong values or a segmentation fault at K = 70 and 300.
PACKED_COLUMNS = 16


@dataclass(frozen=True)
class Int8Weight(RowScaledWeight):
    @cached_property
    def planes(self) -> Planes | None:
        return byte_planes("int8", self.q_NK, self.scale_N)

    def matmul(self, x_TK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        if self._op_refusal(x_TK.shape[0]) is None:
            # The op is fast on bf16 alone: on 2 threads 14 ms a step of SmolLM2 against 79 ms on float32.
            y_TN = torch._weight_int8pack_mm(x_TK.to(torch.bfloat16), self.q_NK, self.scale_N.to(torch.bfloat16))
            y_TN = y_TN.to(x_TK.dtype)
            return y_TN if bias_N is None else y_TN + bias_N
        return linear_unpacked(x_TK, self.shape, self._values, bias_N)

    def route(self, rows: int) -> tuple[str, str]:
        return either(self._op_refusal(rows), "torch's _weight_int8pack_mm", UNPACKED)

    def _op_refusal(self, rows: int) -> str | None:
        """Why torch's int8 op does not multiply so many rows."""
        if not self.q_NK.is_cpu:
            return "torch's int8 op is for the CPU"
        if rows > MAX_PACKED_ROWS:
            return f"above {MAX_PACKED_ROWS} rows torch's int8 op is slower"
        if self.shape[1] % PACKED_COLUMNS:
            return f"{self.shape[1]} columns are no multiple of {PACKED_COLUMNS}"
        return None

    def unpack(self) -> torch.Tensor:
        return self._values(slice(None))

    def _values(self, rows: slice) -> torch.Tensor:
        if self.planes is not None and unpack_refusal(self.planes, self.dtype, self.q_NK.device) is None:
            return unpack_planes(self.planes, rows, self.dtype)
        return self.q_NK[rows].to(self.dtype).mul_(self.scale_N[rows, None].to(self.dtype))  # one copy, not two


def pack(values_NK: torch.Tensor) -> Int8Weight:
    q_NK = torch.empty(values_NK.shape, dtype=torch.int8, device=values_NK.device)
    scale_N = torch.empty(values_NK.shape[0], dtype=torch.float32, device=values_NK.device)
    for rows in packing_chunks(q_NK.shape[0], q_NK.shape[1], q_NK.device):
        values = values_NK[rows].float()
        scale_N[rows] = values.abs().amax(dim=1).clamp_(min=1e-12) / 127
        q_NK[rows] = (values / scale_N[rows, None]).round_().clamp_(-127, 127)
    return Int8Weight(q_NK, scale_N, values_NK.dtype)


def stored_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    return rows * (columns + 4)  # a byte a value and a float32 scale a row


def resident_bytes(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    return stored_bytes(rows, columns, dtype)


def unpack_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    return unpacked_rows(rows, columns) * columns * dtype.itemsize


def packing_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    return quotient_bytes(rows, columns, dtype)
