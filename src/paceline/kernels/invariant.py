"""Products and activations of which no bit depends on how many rows there are, nor on which of them a row is.

A library picks another kernel for another number of rows, and with it another order of the sum over K; a vectorized
loop computes its last elements by another routine than the rest. So here a product always has the same shape
(`by_rows`, whatever the library), or one kernel with one tile and one order of K (`invariant_linear`, Triton: the
weight is then read once for 128 rows, not for every few); and an activation has one row (`row_by_row`).

Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from paceline.kernels.gpu import gpu, triton_refusal

# Rows of a product. CPU: as many as torch's int8 op takes; on a GPU 64 cost what 1 does, the reading of the weight.
PRODUCT_ROWS: Mapping[str, int] = MappingProxyType({"cpu": 8, "cuda": 64})


def by_rows(product: Callable[[torch.Tensor], torch.Tensor], x_TK: torch.Tensor) -> torch.Tensor:
    """product(x), taken as products of PRODUCT_ROWS rows each; the last one is filled up with zeros."""
    rows = PRODUCT_ROWS[x_TK.device.type]
    tokens = x_TK.shape[0]
    padded_TK = x_TK.new_zeros(-(-tokens // rows) * rows, x_TK.shape[1])
    padded_TK[:tokens] = x_TK
    parts = [product(part_RK) for part_RK in torch.split(padded_TK, rows)]
    return parts[0][:tokens] if len(parts) == 1 else torch.cat(parts)[:tokens]


def positions_refusal(product: Callable[[torch.Tensor], torch.Tensor], columns: int, like: torch.Tensor) -> str | None:
    """Why `by_rows` of such a product, of x as `like`, would depend on where a row is, found by trying; None: it does
    not. A library may compute the rows of one product by different routines."""
    rows = PRODUCT_ROWS[like.device.type]
    generator = torch.Generator().manual_seed(0)
    x_1K = torch.randn(1, columns, generator=generator).to(device=like.device, dtype=like.dtype)
    y_RN = product(x_1K.expand(rows, columns).contiguous())
    differing = int((y_RN != y_RN[:1]).any(dim=1).sum())
    return f"{differing} of {rows} equal rows come out different" if differing else None


def row_by_row(function: Callable[[torch.Tensor, str], torch.Tensor]) -> Callable[[torch.Tensor, str], torch.Tensor]:
    """The same function, called for each row. On a GPU it is called once: an element there is one thread's."""

    def call(x_TC: torch.Tensor, name: str) -> torch.Tensor:
        if x_TC.is_cuda or x_TC.shape[0] <= 1:
            return function(x_TC, name)
        return torch.cat([function(x_1C, name) for x_1C in torch.split(x_TC, 1)])

    return call


def invariant_refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why invariant_linear cannot multiply in `dtype` there; None when it can."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype is {dtype}"
    return triton_refusal(device, dtype)


def invariant_linear(x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """x w^T + b, [T, N] in x's dtype, rounded once: the sum over K, in float32, has one order, whatever T is.

    `x_TK` may have any row stride; the weight is contiguous. On compute capability 9.0 and up it starts while the
    kernel before it on the stream still runs, and waits for that one's end before it reads x or writes.
    """
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    from paceline.kernels.invariant_triton import multiply

    tokens, columns = x_TK.shape
    rows = weight_NK.shape[0]
    y_TN = x_TK.new_empty(tokens, rows)
    if y_TN.numel() == 0:
        return y_TN
    wide = x_TK.element_size() == 4  # float32 is not multiplied on the matrix unit, and takes twice the registers
    t_tile, n_tile, k_tile = (32, 32, 32) if wide else (64, 128, 64)
    t_tiles, n_tiles = -(-tokens // t_tile), -(-rows // n_tile)
    dependent = gpu(x_TK.device).dependent
    multiply[(t_tiles * n_tiles,)](
        x_TK,
        weight_NK,
        bias_N,
        y_TN,
        tokens,
        x_TK.stride(0),
        N=rows,
        K=columns,
        T_TILE=t_tile,
        N_TILE=n_tile,
        K_TILE=k_tile,
        DEPENDENT=dependent,
        num_warps=4,
        num_stages=4 if dependent else 3,
        **({"launch_pdl": True} if dependent else {}),
    )
    return y_TN
