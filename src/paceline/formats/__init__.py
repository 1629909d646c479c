"""How a weight is stored and multiplied. A format packs values once, at load, and owns what it packed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch

from paceline.formats import dense, int8
from paceline.kernels.linear import onednn_refusal
from paceline.registry import lookup
from paceline.sizing import MatrixBytes


class Weight(Protocol):
    """A packed [N, K] matrix."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def nbytes(self) -> int:
        """Bytes that one multiplication reads."""
        ...

    def matmul(self, x_TK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """x w^T + b, [T, N] in x's dtype."""
        ...

    def unpack(self) -> torch.Tensor:
        """The values that matmul multiplies by, [N, K]."""
        ...


class Format(Protocol):
    """A module of this package."""

    def pack(self, values_NK: torch.Tensor, /) -> Weight: ...

    def stored_bytes(self, rows: int, columns: int, dtype: torch.dtype, /) -> int:
        """`Weight.nbytes` of such a matrix in a model of `dtype`."""
        ...

    def resident_bytes(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device, /) -> int:
        """What its tensors take on `device`, padding included."""
        ...


FORMATS: Mapping[str, Format] = MappingProxyType({"dense": dense, "int8": int8})


def pack(values_NK: torch.Tensor, format: str, *, dtype: torch.dtype, device: torch.device | str) -> Weight:
    """Pack values for matmuls in `dtype` on `device`. `format`: a key of FORMATS."""
    return lookup(FORMATS, "weight format", format).pack(values_NK.to(device=device, dtype=dtype))


def stored_bytes(format: str, dtype: torch.dtype) -> MatrixBytes:
    """What a step reads of a matrix in `format`, for the memory formula."""
    chosen = lookup(FORMATS, "weight format", format)
    return lambda rows, columns: chosen.stored_bytes(rows, columns, dtype)


def resident_bytes(format: str, dtype: torch.dtype, device: torch.device) -> MatrixBytes:
    """What a matrix in `format` takes on `device`, for the memory formula."""
    chosen = lookup(FORMATS, "weight format", format)
    return lambda rows, columns: chosen.resident_bytes(rows, columns, dtype, device)


def keeps_memory(format: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packing such values, `dtype` on `device` already, leaves them where they are."""
    return format == "dense" and onednn_refusal(shape, dtype, device) is not None
