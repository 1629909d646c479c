"""Weights as they are, in the dtype of the computation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from paceline.kernels.gemv import DENSE_ROWS, Planes
from paceline.kernels.linear import (
    PLAIN_LINEAR,
    linear_onednn,
    linear_ref,
    onednn_refusal,
    pack_onednn,
    packed_bytes,
)


@dataclass(frozen=True)
class DenseWeight:
    values_NK: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values_NK.shape[0], self.values_NK.shape[1])

    @property
    def nbytes(self) -> int:
        return self.values_NK.nbytes

    @cached_property
    def planes(self) -> Planes:
        return Planes("dense", self.shape, self.values_NK, most_rows=DENSE_ROWS)

    def matmul(self, x_TK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        return linear_ref(x_TK, self.values_NK, bias_N)

    def route(self, rows: int) -> tuple[str, str]:
        values_NK = self.values_NK
        reason = onednn_refusal(self.shape, values_NK.dtype, values_NK.device) if values_NK.is_cpu else None
        return PLAIN_LINEAR, reason or ""

    def unpack(self) -> torch.Tensor:
        return self.values_NK


@dataclass(frozen=True)
class OneDNNWeight:
    """Dense values in oneDNN's blocked layout: the same numbers; blocks pad the bytes (kernels/linear.packed_bytes)."""

    packed_NK: torch.Tensor
    shape: tuple[int, int]
    planes: None = None

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.packed_NK.element_size()

    def matmul(self, x_TK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        return linear_onednn(x_TK, self.packed_NK, bias_N)

    def route(self, rows: int) -> tuple[str, str]:
        return "oneDNN's packed linear", ""

    def unpack(self) -> torch.Tensor:
        return self.packed_NK.to_dense()


def pack(values_NK: torch.Tensor) -> DenseWeight | OneDNNWeight:
    if onednn_refusal(values_NK.shape, values_NK.dtype, values_NK.device) is not None:
        return DenseWeight(values_NK.contiguous())
    return OneDNNWeight(pack_onednn(values_NK), (values_NK.shape[0], values_NK.shape[1]))


def stored_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    return rows * columns * dtype.itemsize


def resident_bytes(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    if onednn_refusal((rows, columns), dtype, device) is not None:
        return stored_bytes(rows, columns, dtype)
    return packed_bytes(rows, columns, dtype.itemsize)


def unpack_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    return 0


def packing_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    return 0
