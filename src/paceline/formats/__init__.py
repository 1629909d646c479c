"""How a weight is stored and multiplied. A format packs values once, at load, and owns what it packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

import torch

from paceline.formats import dense, int8
from paceline.registry import lookup


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


FORMATS: Mapping[str, Callable[[torch.Tensor], Weight]] = MappingProxyType({"dense": dense.pack, "int8": int8.pack})

# Bytes a value of the formats that do not keep the model's dtype, for the memory formula; scales are left out.
BYTES_PER_VALUE: Mapping[str, float] = MappingProxyType({"int8": 1.0})


def pack(values_NK: torch.Tensor, format: str, *, dtype: torch.dtype, device: torch.device | str) -> Weight:
    """Pack values for matmuls in `dtype` on `device`. `format`: a key of FORMATS."""
    return lookup(FORMATS, "weight format", format)(values_NK.to(device=device, dtype=dtype))
