"""y = x w^T + b over fp8 weights with x in fp8 (e4m3) too, a scale a row each (Micikevicius et al., 2022), on matrix
units that multiply such values. x loses about what the weight has lost.

x is rounded by a kernel of its own here, or by the one that makes it (kernels/norm.py, kernels/gated.py). Where no such
unit is, `round_rows` takes from x what that takes, and any product follows.

Shapes: T rows of x, N rows of the weight, K columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from paceline.kernels.gpu import gpu, launch_options, triton_refusal

MOST = torch.finfo(torch.float8_e4m3fn).max  # 448
SMALLEST = 1e-12  # of a row's largest value, so that a row of zeros has a scale
MOST_COLUMNS = 32768  # a program holds a row in registers: 64 values a thread in 16 warps


class ScaledRows(NamedTuple):
    """x as float8_e4m3fn [T, K] and float32 scales [T, 1]: x is nearly their product, the largest of a row 448 of its
    scale."""

    q_TK: torch.Tensor
    scale_T1: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.q_TK.shape


def quantize_rows_ref(x_TK: torch.Tensor) -> ScaledRows:
    values_TK = x_TK.float()
    scale_T1 = values_TK.abs().amax(dim=1, keepdim=True).clamp_(min=SMALLEST) / MOST
    return ScaledRows((values_TK / scale_T1).to(torch.float8_e4m3fn), scale_T1)


def round_rows(x_TK: torch.Tensor) -> torch.Tensor:
    """x as quantize_rows_ref keeps it, in its dtype."""
    q_TK, scale_T1 = quantize_rows_ref(x_TK)
    return (q_TK.float() * scale_T1).to(x_TK.dtype)


def scaled_refusal(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the product of a weight [N, K] cannot be taken in fp8; None when it can."""
    refusal = triton_refusal(device, dtype)
    if refusal is not None:
        return refusal
    if dtype != torch.bfloat16:
        return f"dtype is {dtype}"
    capability = gpu(device).capability
    if capability is None or capability < (9, 0):
        return "torch multiplies fp8 rows with a scale each from NVIDIA's compute capability 9.0 on"
    if shape[0] % 16 or shape[1] % 16:
        return f"{shape[0]} x {shape[1]} are no multiples of 16"
    return f"{shape[1]} columns, and the kernel takes {MOST_COLUMNS}" if shape[1] > MOST_COLUMNS else None


def scaled_linear(
    x: ScaledRows, q_NK: torch.Tensor, scale_N: torch.Tensor, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """[T, N] in bfloat16. `q_NK` float8_e4m3fn, contiguous; `scale_N` float32. Sums are those of the matrix unit for
    fp8, which keeps fewer bits than float32 has."""
    y_TN: torch.Tensor = torch._scaled_mm(
        x.q_TK, q_NK.t(), x.scale_T1, scale_N[None, :], bias=bias_N, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return y_TN


def empty_rows(rows: int, columns: int, device: torch.device) -> ScaledRows:
    q_TK = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=device)
    return ScaledRows(q_TK, torch.empty((rows, 1), dtype=torch.float32, device=device))


def quantize_rows(x_TK: torch.Tensor) -> ScaledRows:
    """quantize_rows_ref by one kernel; x may have any row stride. On compute capability 9.0 and up it starts while the
    kernel before it on the stream still runs, and waits for that one's end before it reads x or writes."""
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    import triton

    from paceline.kernels.scaled_linear_triton import quantize_kernel

    (rows, columns), device = x_TK.shape, x_TK.device
    y = empty_rows(rows, columns, device)
    if y.q_TK.numel() == 0:
        return y
    tile = triton.next_power_of_2(columns)
    dependent = gpu(device).dependent
    quantize_kernel[(rows,)](
        x_TK,
        *y,
        x_TK.stride(0),
        K=columns,
        TILE=tile,
        DEPENDENT=dependent,
        num_warps=max(1, min(16, tile // 512)),
        **launch_options(dependent),
    )
    return y
