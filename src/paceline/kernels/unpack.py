"""A packed weight's values, for the products of many rows that go through cuBLAS: each read once, each written once.

Formats' own `unpack` is the plain twin, which takes several passes; of int8 and fp8 it rounds the scale before it
multiplies, and this only the product.

Shapes: N rows of the weight, K columns.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from paceline.kernels.gemv import Planes
from paceline.kernels.gpu import gpu, triton_refusal

BLOCK_K = 512  # columns a program; of int4 a tile's
PACKED = ("int8", "fp8", "int4")


def unpack_refusal(planes: Planes | None, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel cannot write such a weight out; None when it can."""
    if planes is None:
        return "its columns are no whole words"
    if planes.format not in PACKED:
        return f"{planes.format} is not packed"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype is {dtype}"
    return triton_refusal(device, dtype)


def unpack_planes(planes: Planes, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """[rows, K] in `dtype`."""
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    from paceline.kernels.unpack_triton import unpack_kernel

    assert planes.scale is not None
    first, last, _ = rows.indices(planes.shape[0])
    part = replace(planes, values=planes.values[first:last], scale=planes.scale[first:last])
    assert part.scale is not None
    columns, int4 = planes.shape[1], planes.format == "int4"
    out_NK = torch.empty((last - first, columns), dtype=dtype, device=planes.values.device)
    if out_NK.numel() == 0:
        return out_NK
    device = gpu(planes.values.device)
    tile = 4 * planes.group if int4 else BLOCK_K
    block_n = max(1, 4096 // tile)
    unpack_kernel[(-(-out_NK.shape[0] // block_n), -(-columns // tile))](
        w_ptr=part.values,
        scale_ptr=part.scale.view(torch.int32) if int4 else part.scale,
        out_ptr=out_NK,
        N=out_NK.shape[0],
        w_stride=part.values.stride(0),
        K=columns,
        FORMAT=planes.format,
        GROUP=planes.group,
        BLOCK_N=block_n,
        BLOCK_K=tile,
        ASM=device.ptx and dtype == torch.bfloat16,
        num_warps=4,
    )
    return out_NK
