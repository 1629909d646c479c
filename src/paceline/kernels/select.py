"""Where a row's largest values end: the k largest, or those that hold a given mass. Without sorting the row.

Shapes: R rows, V values of each.
"""

from __future__ import annotations

from typing import Any

import torch

from paceline.kernels.gpu import gpu, launch_options, triton_refusal

TILE = 4096  # values that a program looks at at once
# A program searches one row, in some 27 looks at all of it: fewer rows leave most of a GPU idle, and a sort spreads a
# row over all of it.
LEAST_ROWS = 8


def kth_largest_ref(values_RV: torch.Tensor, k_R: torch.Tensor) -> torch.Tensor:
    """float32 [R]: each row's `k`-th largest value, k from 1 to V."""
    return values_RV.sort(dim=1, descending=True).values.gather(1, k_R[:, None] - 1).squeeze(1)


def mass_border_ref(values_RV: torch.Tensor, weights_RV: torch.Tensor, mass_R: torch.Tensor) -> torch.Tensor:
    """float32 [R]: the largest value that has a weight of at least `mass`, float64, at and above it; -inf where all
    have less. A row of which nothing is to be found may say more than 1."""
    sorted_RV, ids_RV = values_RV.sort(dim=1, descending=True)
    held_RV = weights_RV.gather(1, ids_RV).cumsum(dim=1, dtype=torch.float64)
    count_R1 = (held_RV < mass_R[:, None]).sum(dim=1, keepdim=True)
    border_R = sorted_RV.gather(1, count_R1.clamp(max=values_RV.shape[1] - 1)).squeeze(1)
    return border_R.masked_fill(count_R1.squeeze(1) == values_RV.shape[1], -torch.inf)


def select_refusal(values_RV: torch.Tensor) -> str | None:
    """Why the kernel cannot take such values, or should not; None when it can."""
    if values_RV.dtype != torch.float32:
        return f"dtype is {values_RV.dtype}"
    if values_RV.shape[0] < LEAST_ROWS:
        return f"{values_RV.shape[0]} rows are sorted sooner"
    if values_RV.shape[1] > 1 and values_RV.stride(1) != 1:
        return "a row has gaps"
    return triton_refusal(values_RV.device, values_RV.dtype)


def kth_largest(values_RV: torch.Tensor, k_R: torch.Tensor) -> torch.Tensor:
    """kth_largest_ref by a Triton kernel, to the bit but for the sign of a zero; -inf where k is V, and every value is
    among the V largest. Rows with a NaN give some number."""
    return _search(values_RV, values_RV, k_R, float(values_RV.shape[1]), weighted=False)


def mass_border(values_RV: torch.Tensor, weights_RV: torch.Tensor, mass_R: torch.Tensor) -> torch.Tensor:
    """mass_border_ref by the same kernel; `weights_RV` float32, contiguous rows. The sums are float64 too, but in
    another order: a mass within 1e-13 of a border may fall on its other side."""
    return _search(values_RV, weights_RV, mass_R, 1.0, weighted=True)


def _search(
    values_RV: torch.Tensor, weights_RV: torch.Tensor, targets_R: torch.Tensor, most: float, *, weighted: bool
) -> torch.Tensor:
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    from paceline.kernels.select_triton import search

    R, V = values_RV.shape
    found_R = values_RV.new_empty(R)
    if R == 0:
        return found_R
    dependent = gpu(values_RV.device).dependent
    options: dict[str, Any] = {"DEPENDENT": dependent, **launch_options(dependent)}
    search[(R,)](
        values_RV,
        weights_RV,
        targets_R.double(),
        found_R,
        V,
        values_RV.stride(0),
        weights_RV.stride(0),
        most,
        TILE=TILE,
        WEIGHTED=weighted,
        num_warps=8,
        **options,
    )
    return found_R
