"""A few rows of a matrix at a time, so that packing, or multiplying through an unpacked copy, holds little beside it.

Shapes: T tokens, N rows of a matrix, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from paceline.kernels.linear import linear_ref

CHUNK_VALUES = 1 << 22  # packed or converted at once: 16 MiB in float32
# On a GPU the launches bound the packing of so few values: int4 of Llama-3.1-8B then takes 1.9 s beside its reading.
CUDA_CHUNKS = 4  # of the CPU's, which packs those half as fast
# Unpacked at once for a product: 128 MiB in 16 bits, where the head of an 8B model has 1 GiB. A product of 2,048 tokens
# with so many values takes 0.4 ms on an H100, many times a launch.
UNPACKED_VALUES = 1 << 26


def chunk_rows(columns: int) -> int:
    """About CHUNK_VALUES values, a multiple of 64 rows: torch's blocks for int4 on the CPU stay whole."""
    return max(CHUNK_VALUES // columns // 64, 1) * 64


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    step = chunk_rows(columns)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def packing_chunks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """What is packed at once."""
    step = chunk_rows(columns) * (1 if device.type == "cpu" else CUDA_CHUNKS)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def chunk_values(rows: int, columns: int) -> int:
    """Values of the largest chunk."""
    return min(rows, chunk_rows(columns)) * columns


def quotient_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    """What a chunk holds in float32 while it is divided by its scales: those, the quotient, a copy of other values."""
    return min(rows, chunk_rows(columns)) * (8 + columns * (4 if dtype == torch.float32 else 8))


def unpacked_rows(rows: int, columns: int) -> int:
    """Rows that `linear_unpacked` unpacks at once; whole chunks, where the matrix is not that small."""
    at_once = UNPACKED_VALUES // columns
    return min(rows, max(at_once // 64, 1) * 64)


def linear_unpacked(
    x_TK: torch.Tensor,
    shape: tuple[int, int],
    unpack: Callable[[slice], torch.Tensor],
    bias_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x w^T + b for many rows of x. `unpack` gives the values of some rows of the weight in x's dtype."""
    rows, columns = shape
    at_once = unpacked_rows(rows, columns)
    if at_once == rows:
        return linear_ref(x_TK, unpack(slice(0, rows)), bias_N)
    y_TN = x_TK.new_empty(*x_TK.shape[:-1], rows)
    for first in range(0, rows, at_once):
        part = slice(first, min(first + at_once, rows))
        y_TN[..., part] = linear_ref(x_TK, unpack(part), None if bias_N is None else bias_N[part])
    return y_TN
