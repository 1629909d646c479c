"""y = x w^T on CUDA for any number of rows and any storage of the weight, with what follows it.

A few rows go through the kernels of kernels/gemv.py, in float32 through that of kernels/gemv_float32.py, which compute
what follows too; more through cuBLAS, a packed weight written out before (kernels/unpack.py), and what cuBLAS does not
do in one pass afterwards (kernels/epilogue.py); but a GELU of many rows through kernels/gelu_linear.py. The plain twin
is kernels/gemv.py: gemv_ref, then kernels/add_norm.py: add_norm_ref.

Shapes: T rows of x, N rows of the weight, K columns.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from paceline.kernels.add_norm import add_norm
from paceline.kernels.epilogue import finish_product
from paceline.kernels.gelu_linear import gelu_linear, gelu_refusal
from paceline.kernels.gemv import DENSE_ROWS, PLAIN, Epilogue, Planes, gemv, product_parts, shape_refusal
from paceline.kernels.gemv_float32 import float32_gemv, float32_refusal
from paceline.kernels.gemv_launch import Launch, Product, filling_launch, launch_rows, load_table
from paceline.kernels.gpu import gpu
from paceline.kernels.linear import linear_ref
from paceline.kernels.norm import NormWeights
from paceline.kernels.unpack import unpack_planes

# Of dense weights with at most so many values, as BERT's and its like have, all rows up to SMALL_ROWS are the kernel's;
# of larger ones up to DENSE_ROWS, of packed ones as many as they say. BERT-base's four products with all that follows
# take 25 us of 256 rows on an H100, by cuBLAS 30; of 1,024 rows 57 and 48.
SMALL_WEIGHT = 8_000_000
SMALL_ROWS = 256


def cuda_linear(
    x_TK: torch.Tensor, planes: Planes, epilogue: Epilogue = PLAIN, *, launch: Launch | None = None
) -> torch.Tensor:
    """[T, outputs] in x's dtype. x and the residual may have any row stride. `launch`: if None, the table's; without
    one filling_launch's for several rows and a weight of at most SMALL_WEIGHT values, else gemv's."""
    if _is_few_in_float32(x_TK, planes):
        return float32_gemv(x_TK, planes.values, epilogue)
    if kernel_refusal(x_TK, planes) is None:
        return gemv(x_TK, planes, epilogue=epilogue, launch=launch or _launch(x_TK, planes))
    return _by_cublas(x_TK, planes, epilogue)


def linear_norm(
    x_TK: torch.Tensor,
    planes: Planes,
    norm: NormWeights,
    *,
    bias_N: torch.Tensor | None = None,
    residual_TN: torch.Tensor | None = None,
    keep_sum: bool = False,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """add_norm of the product: (the norm of residual + x w^T + bias, and that sum where `keep_sum`), in x's dtype.

    The kernel for a few rows splits K over as many programs as the device runs, and the norm's adds their parts: no
    pass of its own does.
    """
    if _is_few_in_float32(x_TK, planes):
        product_TN = float32_gemv(x_TK, planes.values)
    elif kernel_refusal(x_TK, planes) is not None:
        product_TN = _by_cublas(x_TK, planes, PLAIN)
    elif x_TK.shape[0] == 1:
        product_TN = gemv(x_TK, planes, launch=launch)
    else:
        product_TN = product_parts(x_TK, planes, launch or _launch(x_TK, planes))
    return add_norm(product_TN, norm, residual_TC=residual_TN, bias_C=bias_N, keep_sum=keep_sum, dtype=x_TK.dtype)


def _is_few_in_float32(x_TK: torch.Tensor, planes: Planes) -> bool:
    return planes.format == "dense" and float32_refusal(x_TK, planes.values) is None


def kernel_refusal(x_TK: torch.Tensor, planes: Planes) -> str | None:
    """Why such rows are not kernels/gemv.py's; None where they are."""
    N, K = planes.shape
    if planes.format == "dense":
        planes = replace(planes, most_rows=SMALL_ROWS if N * K <= SMALL_WEIGHT else DENSE_ROWS)
    return shape_refusal(x_TK, planes)


def _launch(x_TK: torch.Tensor, planes: Planes) -> Launch | None:
    """None: gemv's own."""
    if x_TK.shape[0] <= 1 or planes.shape[0] * planes.shape[1] > SMALL_WEIGHT:
        return None
    product, device = Product(planes.format, planes.shape, launch_rows(x_TK.shape[0]), planes.group), gpu(x_TK.device)
    return None if product in load_table(device.name) else filling_launch(product, device)


def _by_cublas(x_TK: torch.Tensor, planes: Planes, epilogue: Epilogue) -> torch.Tensor:
    dense = planes.format == "dense"
    weight_NK = planes.values if dense else unpack_planes(planes, slice(None), x_TK.dtype)
    bias, activation = epilogue.bias_N, epilogue.activation
    if activation is None and epilogue.residual_TN is None:
        return linear_ref(x_TK, weight_NK, bias)
    if bias is None and activation is None and not epilogue.gated:
        assert epilogue.residual_TN is not None
        return torch.addmm(epilogue.residual_TN, x_TK, weight_NK.t())
    alone = not epilogue.gated and epilogue.residual_TN is None
    if alone and activation == "gelu" and gelu_refusal(x_TK, weight_NK) is None:
        return gelu_linear(x_TK, weight_NK, bias)
    if alone and _inside_cublas(x_TK, epilogue):
        assert bias is not None
        y_TN: torch.Tensor = torch._addmm_activation(bias, x_TK, weight_NK.t(), use_gelu=activation == "gelu_tanh")
        return y_TN
    return finish_product(linear_ref(x_TK, weight_NK), epilogue)


def _inside_cublas(x_TK: torch.Tensor, epilogue: Epilogue) -> bool:
    """Whether cuBLAS has such a bias and activation. Its GELU is that by tanh, for 16 bits; a CPU's, under the same
    name, is that by erf."""
    return (
        epilogue.activation in ("relu", "gelu_tanh")
        and epilogue.bias_N is not None
        and x_TK.is_cuda
        and x_TK.dtype != torch.float32
        and hasattr(torch, "_addmm_activation")  # private
    )
