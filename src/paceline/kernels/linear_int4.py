"""y = x w^T over int4 weights on CPU, through torch's packed op: the weight is never written out.

Torch's plane holds 64 rows (with AVX2: 32) in a block; a byte of column k has row j of the block in its low nibble and
row j + 32 (16) in its high one. The ops are private and this file is the only one that touches them: the layout is
tried on a small matrix first, and where it is another one the format runs unpacked (formats/int4.py).

Shapes: T tokens, N rows of a matrix, K columns, G groups of columns.
"""

from __future__ import annotations

from functools import cache

import torch

BLOCKS = (64, 32)


def int4_refusal(num_rows: int, device: torch.device) -> str | None:
    """Why torch's int4 op cannot take a matrix of so many rows; None when it can."""
    if device.type != "cpu":
        return f"device is {device.type}"
    block = plane_block()
    if block is None:
        return "this torch has no int4 op whose layout is known"
    if num_rows == 0 or num_rows % block:
        return f"its rows are not a multiple of {block}"
    return None


@cache
def plane_block() -> int | None:
    """Rows in a block of torch's plane on this CPU, or None where its layout is not one of those we can read."""
    if not hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
        return None
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    q_NK = (torch.arange(128 * 32) * 7 % 31 % 16).view(128, 32).to(torch.uint8)
    plane = pack_plane(q_NK)
    return next((block for block in BLOCKS if torch.equal(unpack_plane(plane, block), q_NK)), None)


def pack_plane(q_NK: torch.Tensor) -> torch.Tensor:
    """Values 0..15 (uint8) in torch's layout, uint8 [N, K / 2]."""
    plane: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q_NK.to(torch.int32), 1)
    return plane


def unpack_plane(plane: torch.Tensor, block: int) -> torch.Tensor:
    """The values again, uint8 [N, K]. `plane`: whole blocks of rows."""
    num_rows, columns = plane.shape[0], 2 * plane.shape[1]
    bytes_BKH = plane.view(num_rows // block, columns, block // 2)
    return torch.cat([bytes_BKH & 15, bytes_BKH >> 4], dim=2).transpose(1, 2).reshape(num_rows, columns)


def linear_int4(
    x_TK: torch.Tensor, plane: torch.Tensor, scale_offset_GN2: torch.Tensor, group_size: int
) -> torch.Tensor:
    """Each weight is (q - 8) * scale + offset. Computed in bfloat16, the only dtype in which the op is fast: a row of
    3,072 x 576 takes 0.10 ms, in float32 3.0 ms and in float16 3.3 ms (one thread, AVX-512). [T, N] in x's dtype."""
    y_TN: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x_TK.to(torch.bfloat16), plane, group_size, scale_offset_GN2
    )
    return y_TN.to(x_TK.dtype)
