"""How a weight is stored and multiplied. A format packs values once, at load, and owns what it packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Protocol

import torch

from paceline.formats import dense, fp8, int4, int8, w8a8_fp8
from paceline.formats.chunks import CUDA_CHUNKS
from paceline.kernels.gemv import Planes
from paceline.kernels.linear import onednn_refusal
from paceline.registry import lookup
from paceline.sizing import FormatBytes, MatrixBytes


class Weight(Protocol):
    """A packed [N, K] matrix."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def nbytes(self) -> int:
        """Bytes that one multiplication reads."""
        ...

    @property
    def planes(self) -> Planes | None:
        """The same bytes as the GEMV kernel reads them; None for a layout that it does not know."""
        ...

    def matmul(self, x_TK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        """x w^T + b, [T, N] in x's dtype."""
        ...

    def route(self, rows: int) -> tuple[str, str]:
        """What matmul runs for so many rows, in words, and why nothing faster; '' where nothing is."""
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

    def unpack_bytes(self, rows: int, columns: int, dtype: torch.dtype, /) -> int:
        """What a product of many rows holds of the matrix, unpacked; 0 where it multiplies what is packed."""
        ...

    def packing_bytes(self, rows: int, columns: int, dtype: torch.dtype, /) -> int:
        """What `pack` holds beside the values and what it packs them into, on the CPU; CUDA_CHUNKS times that on a
        GPU, at most."""
        ...


FORMATS: Mapping[str, Format] = MappingProxyType(
    {"dense": dense, "int8": int8, "int4": int4, "fp8": fp8, "w8a8-fp8": w8a8_fp8}
)
# What the output head takes instead, whose errors reach the logits at once, and a matrix that would not gain.
FINER: Mapping[str, str] = MappingProxyType({"int4": "int8"})


def head_format(format: str) -> str:
    """The format of a model's output head where that of its linears is `format`."""
    return FINER.get(format, format)


def refusal(format: str, rows: int, columns: int) -> str | None:
    """Why such a matrix takes FINER[format] instead; None where it does not."""
    return int4.refusal(rows, columns) if format == "int4" else None


def matrix_format(format: str, rows: int, columns: int) -> str:
    """The format that such a matrix takes in a model whose linears are in `format`."""
    return format if refusal(format, rows, columns) is None else FINER[format]


def pack(values_NK: torch.Tensor, format: str, *, dtype: torch.dtype, device: torch.device | str) -> Weight:
    """Pack values for matmuls in `dtype` on `device`. `format`: a key of FORMATS."""
    return lookup(FORMATS, "weight format", format).pack(values_NK.to(device=device, dtype=dtype))


def stored_bytes(format: str, dtype: torch.dtype) -> FormatBytes:
    """What a step reads of the matrices of a model in `format`, for the memory formula."""
    return _format_bytes(format, lambda chosen, rows, columns: chosen.stored_bytes(rows, columns, dtype))


def resident_bytes(format: str, dtype: torch.dtype, device: torch.device) -> FormatBytes:
    """What its matrices take on `device`, for the memory formula."""
    return _format_bytes(format, lambda chosen, rows, columns: chosen.resident_bytes(rows, columns, dtype, device))


def unpack_bytes(format: str, dtype: torch.dtype) -> FormatBytes:
    """What a product through an unpacked copy of one of them holds, for the memory formula."""
    return _format_bytes(format, lambda chosen, rows, columns: chosen.unpack_bytes(rows, columns, dtype))


def packing_bytes(format: str, dtype: torch.dtype, device: torch.device) -> FormatBytes:
    """What packing one of them holds beside its values and what they are packed into."""
    chunks = 1 if device.type == "cpu" else CUDA_CHUNKS
    return _format_bytes(format, lambda chosen, rows, columns: chunks * chosen.packing_bytes(rows, columns, dtype))


def _format_bytes(format: str, size: Callable[[Format, int, int], int]) -> FormatBytes:
    lookup(FORMATS, "weight format", format)

    def matrix_bytes(format: str) -> MatrixBytes:
        return lambda rows, columns: size(FORMATS[matrix_format(format, rows, columns)], rows, columns)

    return FormatBytes(layers=matrix_bytes(format), head=matrix_bytes(head_format(format)))


def over(weight: Weight, planes: Planes) -> Weight:
    """The same weight whose memory is that of `planes`, as its own are. Raises TypeError for one without planes."""
    if isinstance(weight, dense.DenseWeight):
        return replace(weight, values_NK=planes.values)
    assert planes.scale is not None
    if isinstance(weight, int8.Int8Weight):
        return replace(weight, q_NK=planes.values.view(torch.int8), scale_N=planes.scale)
    if isinstance(weight, fp8.FP8Weight):
        return replace(weight, q_NK=planes.values.view(torch.float8_e4m3fn), scale_N=planes.scale)
    if isinstance(weight, int4.Int4Weight):
        return replace(weight, words_NW=planes.values, scale_offset_NG2=planes.scale)
    raise TypeError(f"{type(weight).__name__} has no planes")


def keeps_memory(format: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packing such values, `dtype` on `device` already, leaves them where they are."""
    return format == "dense" and onednn_refusal(shape, dtype, device) is not None
