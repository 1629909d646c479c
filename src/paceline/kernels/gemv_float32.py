"""y = x w^T for up to 8 rows in float32, with what follows it, reading the weight once: what a step of generation
multiplies in models that stay in float32.

us on an H100, cuBLAS and this, whose roof is 0.8 for the first of these weights and 3.3 for the other two:

| rows | 768 x 768 | 3,072 x 768 | 768 x 3,072 |
|---|---|---|---|
| 1 | 3.6, 1.9 | 6.9, 4.5 | 5.8, 5.4 |
| 4 | 4.2, 2.9 | 8.0, 6.0 | 17.8, 6.2 |
| 8 | 7.2, 4.4 | 10.8, 6.7 | 31.9, 9.1 |

The matrix unit has no part in it: it would round to 10 bits.

The plain twin is kernels/gemv.py: gemv_ref; the kernel is in kernels/gemv_float32_triton.py.

Legend: T rows of x, N rows of the weight, K columns; M: T padded to a power of two.
"""

from __future__ import annotations

import torch

from paceline.kernels.gemv import PLAIN, Epilogue
from paceline.kernels.gpu import gpu, launch_options

MOST_ROWS = 8
TILE = 8192  # products that a program has at once, in 4 warps; with 4,096 eight rows of 3,072 x 768 take 10.3 us
AHEAD_BYTES = 32768  # of the weight, that a program asks for before x is there


def float32_refusal(x_TK: torch.Tensor, weight_NK: torch.Tensor) -> str | None:
    """Why float32_gemv cannot take them, apart from their device; None when it can."""
    if x_TK.dtype != torch.float32 or weight_NK.dtype != torch.float32:
        return f"x is {x_TK.dtype} and the weight {weight_NK.dtype}"
    if x_TK.shape[0] > MOST_ROWS:
        return f"{x_TK.shape[0]} rows, and the kernel takes {MOST_ROWS}"
    if x_TK.shape[1] > 1 and x_TK.stride(1) != 1:
        return "a row of x has gaps"
    return None if weight_NK.is_contiguous() else "the weight has gaps"


def float32_gemv(x_TK: torch.Tensor, weight_NK: torch.Tensor, epilogue: Epilogue = PLAIN) -> torch.Tensor:
    """[T, outputs] in float32. x and the residual may have any row stride.

    On compute capability 9.0 and up it starts while the kernel before it on the stream still runs: the weight is asked
    for at once, x and everything else read only when that one is done.
    """
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    from triton import next_power_of_2

    from paceline.kernels.gemv_float32_triton import gemv_float32_kernel

    T, (N, K) = x_TK.shape[0], weight_NK.shape
    y_TN = x_TK.new_empty((T, N // 2 if epilogue.gated else N))
    if y_TN.numel() == 0:
        return y_TN
    chip, rows, residual = gpu(x_TK.device), next_power_of_2(T), epilogue.residual_TN
    block_n = 8
    while block_n > 2 and 2 * chip.processors * block_n > N:  # two programs a multiprocessor
        block_n //= 2
    gemv_float32_kernel[(-(-N // block_n),)](
        x_TK,
        weight_NK,
        epilogue.bias_N,
        residual,
        y_TN,
        T,
        N,
        x_TK.stride(0),
        y_TN.stride(0),
        0 if residual is None else residual.stride(0),
        K=K,
        ACTIVATION=epilogue.activation or "none",
        GATED=epilogue.gated,
        M=rows,
        BLOCK_N=block_n,
        BLOCK_K=min(TILE // (block_n * rows), next_power_of_2(K)),
        AHEAD=min(next_power_of_2(-(-K // 32)), AHEAD_BYTES // (128 * block_n)),
        STAGES=3,
        DEPENDENT=chip.dependent,
        num_warps=4,
        **launch_options(chip.dependent),
    )
    return y_TN
