"""fp8 weights (e4m3, Micikevicius et al., 2022), one scale an output channel: w = q * scale, |q| at most 448.

Few rows on a GPU are multiplied as stored (kernels/gemv.py). Everything else unpacks before each product, a CPU always:
there it saves memory, not time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from paceline.formats.chunks import chunk_values, linear_unpacked, packing_chunks, quotient_bytes, unpacked_rows
from paceline.formats.row_scaled import RowScaledWeight
from paceline.kernels.gemv import Planes, byte_planes
from paceline.kernels.linear import UNPACKED
from paceline.kernels.unpack import unpack_planes, unpack_refusal

MOST = torch.finfo(torch.float8_e4m3fn).max  # 448


@dataclass(frozen=True)
class FP8Weight(RowScaledWeight):
    @cached_property
    def planes(self) -> Planes | None:
        return byte_planes("fp8", self.q_NK, self.scale_N)

    def matmul(self, x_TK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        return linear_unpacked(x_TK, self.shape, self._values, bias_N)

    def route(self, rows: int) -> tuple[str, str]:
        return UNPACKED, "torch has no product of fp8 weights and wider rows"

    def unpack(self) -> torch.Tensor:
        return self._values(slice(None))

    def _values(self, rows: slice) -> torch.Tensor:
        if self.planes is not None and unpack_refusal(self.planes, self.dtype, self.q_NK.device) is None:
            return unpack_planes(self.planes, rows, self.dtype)
        q_NK = self.q_NK[rows]
        # Through q * 2^-8: the scale of a row that ends at 0.027 is 6e-5, the smallest of float16's normal numbers.
        values_NK = _shifted(q_NK).to(self.dtype) if q_NK.is_cpu else q_NK.to(self.dtype).mul_(2**-8)
        return values_NK.mul_((self.scale_N[rows] * 2**8).to(self.dtype)[:, None])


def pack(values_NK: torch.Tensor) -> FP8Weight:
    q_NK = torch.empty(values_NK.shape, dtype=torch.float8_e4m3fn, device=values_NK.device)
    scale_N = torch.empty(values_NK.shape[0], dtype=torch.float32, device=values_NK.device)
    for rows in packing_chunks(q_NK.shape[0], q_NK.shape[1], q_NK.device):
        values = values_NK[rows].float()
        scale_N[rows] = values.abs().amax(dim=1).clamp_(min=1e-12) / MOST
        q_NK[rows] = (values / scale_N[rows, None]).to(torch.float8_e4m3fn)
    return FP8Weight(q_NK, scale_N, values_NK.dtype)


def _shifted(q_NK: torch.Tensor) -> torch.Tensor:
    """q * 2^-8 in float16: its exponent has one bit more and another bias, its mantissa seven bits more. Moving the
    bits takes a CPU a third of the time of the cast (4,096 x 1,024 to bfloat16 7.1 ms, not 18.4)."""
    bits_NK = q_NK.view(torch.int8).to(torch.int16)  # the sign is in bits 7 to 15
    return bits_NK.bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16)


def stored_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    return rows * (columns + 4)  # a byte a value and a float32 scale a row


def resident_bytes(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    return stored_bytes(rows, columns, dtype)


def unpack_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    narrow = 0 if dtype == torch.float16 else 2  # float16 on the way
    return unpacked_rows(rows, columns) * columns * (dtype.itemsize + narrow)


def packing_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    return quotient_bytes(rows, columns, dtype) + chunk_values(rows, columns)  # and that in eight bits
