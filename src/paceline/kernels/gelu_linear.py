"""gelu(x w^T + bias) of many rows in 16 bits, by one kernel: cuBLAS has a GELU by tanh alone, and a pass over what
cuBLAS leaves reads and writes it once more.

BERT-base's 3,072 x 768 on an H100, us: of 1,024 rows 15.0, by cuBLAS and a pass over its result 15.8; of 4,096 rows
41.5 and 50.9; of 16,384 167 and 204. cuBLAS's product alone takes 10.8, 33 and 117: a multiprocessor's matrix unit
waits while it computes the GELU.

The plain twin is kernels/gemv.py: gemv_ref; the kernel is in kernels/gelu_linear_triton.py.

Legend: T rows of x, N rows of the weight, K columns.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from paceline.kernels.gpu import gpu, launch_options

FEWEST_OUTPUTS = 1 << 21  # T * N: with fewer there are too few of its blocks
BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
ALIGNMENT = 16  # bytes: of the first element and of the rows, for loads by descriptor


def gelu_refusal(x_TK: torch.Tensor, weight_NK: torch.Tensor) -> str | None:
    """Why gelu_linear cannot take them or is not worth it; None when it is."""
    if not gpu(x_TK.device).dependent:
        return "loads by descriptor need compute capability 9.0"
    if x_TK.shape[0] * weight_NK.shape[0] < FEWEST_OUTPUTS:
        return f"{x_TK.shape[0]} x {weight_NK.shape[0]} outputs are fewer than {FEWEST_OUTPUTS}"
    return gelu_shape_refusal(x_TK, weight_NK)


def gelu_shape_refusal(x_TK: torch.Tensor, weight_NK: torch.Tensor) -> str | None:
    """gelu_refusal without the device and the size: what the interpreter, too, cannot take."""
    if find_spec("triton.tools.tensor_descriptor") is None:
        return "Triton is older than 3.4"
    if x_TK.dtype not in (torch.float16, torch.bfloat16) or weight_NK.dtype != x_TK.dtype:
        return f"x is {x_TK.dtype} and the weight {weight_NK.dtype}"
    for tensor in (x_TK, weight_NK):
        if tensor.stride(1) != 1 or tensor.data_ptr() % ALIGNMENT or tensor.stride(0) * 2 % ALIGNMENT:
            return "rows do not begin at multiples of 16 bytes"
    return "outputs are no multiple of 8" if weight_NK.shape[0] % 8 else None


def gelu_linear(x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """[T, N] in x's dtype: products and sums in float32, GELU with an error of 5e-5 at most, or 1e-5 of its size,
    then rounded.

    On compute capability 9.0 and up it starts while the kernel before it on the stream still runs, and waits for that
    one's end before it reads or writes.
    """
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    from triton.tools.tensor_descriptor import TensorDescriptor

    from paceline.kernels.gelu_linear_triton import gelu_linear_kernel

    (T, K), N = x_TK.shape, weight_NK.shape[0]
    y_TN = x_TK.new_empty((T, N))
    if y_TN.numel() == 0:
        return y_TN
    dependent = gpu(x_TK.device).dependent
    gelu_linear_kernel[(-(-T // BLOCK_M) * -(-N // BLOCK_N),)](
        TensorDescriptor.from_tensor(x_TK, [BLOCK_M, BLOCK_K]),
        TensorDescriptor.from_tensor(weight_NK, [BLOCK_N, BLOCK_K]),
        TensorDescriptor.from_tensor(y_TN, [BLOCK_M, BLOCK_N // 2]),
        bias_N,
        T,
        N,
        K,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        DEPENDENT=dependent,
        num_warps=8,
        num_stages=3,
        **launch_options(dependent),
    )
    return y_TN
