"""A weight whose products do not depend, by a single bit, on how many rows are multiplied at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.formats import Weight
from paceline.formats.dense import DenseWeight
from paceline.kernels.invariant import PRODUCT_ROWS, by_rows, invariant_linear, invariant_refusal, positions_refusal


@dataclass(frozen=True)
class InvariantWeight:
    """Any weight, multiplied so many rows at a time, always; a dense one on a GPU by one kernel for any number."""

    weight: Weight
    dtype: torch.dtype
    device: torch.device
    planes: None = None  # the GEMV kernels sum otherwise for other numbers of rows

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def matmul(self, x_TK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        if isinstance(self.weight, DenseWeight) and self._kernel_refusal() is None:
            return invariant_linear(x_TK, self.weight.values_NK, bias_N)
        return by_rows(lambda x_RK: self.weight.matmul(x_RK, bias_N), x_TK)

    def refusal(self) -> str | None:
        """Why its products would differ all the same; None where they do not. Found by trying."""
        if isinstance(self.weight, DenseWeight) and self._kernel_refusal() is None:
            return None
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return positions_refusal(self.weight.matmul, self.shape[1], like)

    def route(self, rows: int) -> tuple[str, str]:
        refusal = self._kernel_refusal() if isinstance(self.weight, DenseWeight) else "the weight is packed"
        if refusal is None:
            return "Triton, one order of K", ""
        at_once = PRODUCT_ROWS[self.device.type]
        return (
            f"{self.weight.route(at_once)[0]}, {at_once} rows at a time",
            refusal if self.device.type != "cpu" else "",
        )

    def unpack(self) -> torch.Tensor:
        return self.weight.unpack()

    def _kernel_refusal(self) -> str | None:
        return invariant_refusal(self.dtype, self.device)
