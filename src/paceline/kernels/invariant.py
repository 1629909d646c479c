"""Products and activations of which no bit depends on how many rows there are, nor on which of them a row is.

A library picks another kernel for another number of rows, and with it another order of the sum over K; a vectorized
loop computes its last elements by another routine than the rest. So here a product always has the same shape
(`by_rows`, whatever the library), or one kernel with one tile and one order of K (`invariant_linear`, Triton: the
weight is then read once for 128 rows, not for every few); and an activation has one row (`row_by_row`).

Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from paceline.kernels.gpu import gpu, launch_options, triton_refusal

# Rows of a product. CPU: as many as torch's int8 op takes; on a GPU 64 cost what 1 does, the reading of the weight.
PRODUCT_ROWS: Mapping[str, int] = MappingProxyType({"cpu": 8, "cuda": 64})
MOST_PIECES = 8
ADDED = 1024  # columns of one program that adds pieces


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


@dataclass(frozen=True)
class InvariantLaunch:
    """How a product is cut. A function of the weight and the device, never of the number of rows."""

    t_tile: int
    n_tile: int
    k_tile: int
    pieces: int  # of K: each is summed by itself, and then they are added in order
    stages: int


def default_launch(rows: int, columns: int, itemsize: int, device: torch.device) -> InvariantLaunch:
    """For a weight [rows, columns]: pieces until a tile of tokens makes two programs a multiprocessor, of 4 tiles each
    at least."""
    chip = gpu(device)
    if itemsize == 4:  # not multiplied on the matrix unit, and twice the registers
        t_tile, n_tile, k_tile = 32, 32, 32
    else:
        t_tile, n_tile, k_tile = 64, 128, 64
    most = min(MOST_PIECES, 2 * chip.processors // -(-rows // n_tile), columns // (4 * k_tile))
    pieces = 1 << (max(1, most).bit_length() - 1)
    return InvariantLaunch(t_tile, n_tile, k_tile, pieces, 4 if chip.dependent else 3)


def invariant_linear(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    launch: InvariantLaunch | None = None,
) -> torch.Tensor:
    """x w^T + b, [T, N] in x's dtype, rounded once: the sum over K, in float32, has one order, whatever T is.

    Few rows take a program a piece of K and a second kernel that adds the pieces, many rows one program for all of
    them: the bits are the same. `x_TK` may have any row stride; the weight is contiguous. On compute capability 9.0 and
    up a kernel starts while the one before it on the stream still runs, and waits for that one's end before it reads x
    or writes.
    """
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    from paceline.kernels.invariant_triton import add_pieces, multiply

    (tokens, columns), rows = x_TK.shape, weight_NK.shape[0]
    y_TN = x_TK.new_empty(tokens, rows)
    if y_TN.numel() == 0:
        return y_TN
    chip = gpu(x_TK.device)
    launch = launch or default_launch(rows, columns, x_TK.element_size(), x_TK.device)
    pieces, piece = launch.pieces, -(-columns // (launch.pieces * launch.k_tile)) * launch.k_tile
    tiles = -(-tokens // launch.t_tile) * -(-rows // launch.n_tile)
    apart = pieces > 1 and tiles < chip.processors
    parts = x_TK.new_empty((pieces, tokens, rows), dtype=torch.float32) if apart else y_TN
    dependent = launch_options(chip.dependent)
    multiply[(tiles, pieces if apart else 1)](
        x_TK,
        weight_NK,
        bias_N,
        parts,
        tokens,
        x_TK.stride(0),
        N=rows,
        K=columns,
        PIECES=pieces,
        PIECE=piece,
        APART=apart,
        T_TILE=launch.t_tile,
        N_TILE=launch.n_tile,
        K_TILE=launch.k_tile,
        DEPENDENT=chip.dependent,
        num_warps=4,
        num_stages=launch.stages,
        **dependent,
    )
    if apart:
        add_pieces[(tokens, -(-rows // ADDED))](
            parts,
            bias_N,
            y_TN,
            tokens,
            N=rows,
            PIECES=pieces,
            BLOCK=ADDED,
            DEPENDENT=chip.dependent,
            num_warps=4,
            **dependent,
        )
    return y_TN
