"""What follows a product that cuBLAS made, in one pass over it: bias, activation, gate, residual.

The plain twin is what kernels/gemv.py: gemv_ref does after its product. The kernel is in kernels/epilogue_triton.py,
for CUDA where `epilogue_refusal` finds nothing against it.

Shapes: T tokens, N outputs of the product.
"""

from __future__ import annotations

import torch

from paceline.kernels.gemv import Epilogue
from paceline.kernels.gpu import gpu, launch_options, triton_refusal

# Channels of a program, in 2 warps. GELU over 16,384 x 3,072 takes 76 us so on an H100, in 4 warps 80, 2,048 in 8 warps
# 100 and 512 in any 119; what only reads and writes takes 72.
BLOCK = 1024


def epilogue_refusal(product_TN: torch.Tensor) -> str | None:
    """Why finish_product cannot take such rows; None when it can."""
    if product_TN.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype is {product_TN.dtype}"
    if product_TN.dim() != 2 or product_TN.stride(1) != 1:
        return "they are no matrix of whole rows"
    return triton_refusal(product_TN.device, product_TN.dtype)


def finish_product(product_TN: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """The epilogue's result, computed in float32 and rounded once; in the product's own memory where that is as wide.

    On compute capability 9.0 and up it starts while the kernel before it on the stream still runs, and waits for that
    one's end before it reads or writes.
    """
    T, N = product_TN.shape
    y_TN = product_TN.new_empty((T, N // 2)) if epilogue.gated else product_TN
    launch_epilogue(product_TN, y_TN, epilogue, BLOCK, warps=2)
    return y_TN


def launch_epilogue(
    x_TN: torch.Tensor,
    y_TN: torch.Tensor,
    epilogue: Epilogue,
    block: int,
    *,
    warps: int,
    scale_T1: torch.Tensor | None = None,
) -> None:
    """The kernel with its arguments as kernels/epilogue_triton.py has them."""
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    from paceline.kernels.epilogue_triton import epilogue_kernel

    if y_TN.numel() == 0:
        return
    residual = epilogue.residual_TN
    dependent = gpu(x_TN.device).dependent
    # Tokens come first: the other axes of a grid end at 65,535.
    epilogue_kernel[(y_TN.shape[0], -(-y_TN.shape[1] // block))](
        x_TN,
        y_TN,
        scale_T1,
        epilogue.bias_N,
        residual,
        x_TN.stride(0),
        y_TN.stride(0),
        0 if residual is None else residual.stride(0),
        C=y_TN.shape[1],
        BLOCK=block,
        ACTIVATION=epilogue.activation or "none",
        GATED=epilogue.gated,
        DEPENDENT=dependent,
        num_warps=warps,
        **launch_options(dependent),
    )
