"""y = norm(x) w^T for a few rows, with what follows it, reading the weight once in the form it is stored in.

`gemv_ref` composes plain torch ops and takes anything; `gemv` runs Triton's kernels, for up to 256 rows on CUDA
where `gemv_refusal` finds nothing against it: kernels/gemv_row_triton.py for one row, kernels/gemv_int4_triton.py for
one over int4, kernels/gemm_triton.py for the rest. kernels/gemv_launch.py says how they are launched.

Shapes: T rows of x, N rows of the weight, K columns; outputs are N, or N / 2 where gate and up make one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from paceline.kernels.activation import activate, gated
from paceline.kernels.gemv_launch import Launch, Product, choose_launch, launch_rows
from paceline.kernels.gpu import GPU, gpu, launch_options, triton_refusal
from paceline.kernels.linear import linear_ref
from paceline.kernels.norm import norm_rows, norm_shape_refusal, rms_norm

# Of packed weights, which a product of more rows writes out first: twice their bytes and again, beside its own reading.
MAX_ROWS = 256
# Of dense ones, which cuBLAS takes as they are. On an H100 the products of Llama-3.1-8B's 32 layers take the kernel
# 5.35 ms of 32 rows, 5.82 of 64 and 6.70 of 128, with what follows them, and cuBLAS 5.99, 5.69 and 5.93 without.
DENSE_ROWS = 64
FORMATS = ("dense", "int8", "fp8", "int4")
GROUPS = (32, 64, 128)
# Values of a weight up to which one row's norm belongs into the product, where each program norms all of x. On an H100
# that costs 0.15 us and 0.1 us a million values more, a kernel of its own 0.8 us: SmolLM2-135M's layers take 0.40 ms
# so and 0.45 with 60 such kernels.
FUSED_NORM = 6_000_000
PARTS_BLOCK = 256  # outputs that a program adds the parts of
BYTES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Planes:
    """A weight as the kernel reads it.

    dense: values [N, K] in x's dtype. int8 and fp8 (e4m3): values [N, K / 4], int32 words of 4 values in memory order,
    scale [N]. int4, w = (q - 8) * scale + offset: values int32 [N, tiles * group / 2] and scale bfloat16
    [N, tiles * 4, 2], (scale, offset) of each group, for whole tiles of 4 groups (formats/int4.py has the words'
    order). Every tensor contiguous. `most_rows`: of x, above which the weight is multiplied by other means.
    """

    format: str
    shape: tuple[int, int]
    values: torch.Tensor
    scale: torch.Tensor | None = None
    group: int = 0
    most_rows: int = MAX_ROWS


def byte_planes(format: str, q_NK: torch.Tensor, scale_N: torch.Tensor) -> Planes | None:
    """int8 or fp8 values, contiguous, as words; None where a row is no whole number of them."""
    rows, columns = q_NK.shape
    return None if columns % 4 else Planes(format, (rows, columns), q_NK.view(torch.int32), scale_N)


@dataclass(frozen=True)
class Norm:
    """An RMS norm of x over its columns; a unit offset is in the weight already."""

    weight_K: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Epilogue:
    """What follows the product: bias, activation (of the first half of the outputs times the second when `gated`),
    residual, in this order."""

    bias_N: torch.Tensor | None = None
    activation: str | None = None
    gated: bool = False
    residual_TN: torch.Tensor | None = None


PLAIN = Epilogue()


def gemv_ref(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, norm: Norm | None = None, epilogue: Epilogue = PLAIN
) -> torch.Tensor:
    """The same by plain torch ops on the unpacked weight, each rounded to x's dtype."""
    if norm is not None:
        x_TK = rms_norm(x_TK, norm.weight_K, norm.eps)
    y_TN = linear_ref(x_TK, weight_NK, epilogue.bias_N)
    if epilogue.activation is not None:
        y_TN = gated(y_TN, epilogue.activation) if epilogue.gated else activate(y_TN, epilogue.activation)
    return y_TN if epilogue.residual_TN is None else y_TN + epilogue.residual_TN


def gemv_refusal(x_TK: torch.Tensor, planes: Planes, norm: Norm | None = None) -> str | None:
    """Why the kernel cannot take such a product; None when it can."""
    return device_refusal(x_TK.device, x_TK.dtype, planes) or shape_refusal(x_TK, planes, norm)


def device_refusal(device: torch.device, dtype: torch.dtype, planes: Planes) -> str | None:
    """gemv_refusal without the shape of x."""
    refusal = triton_refusal(device, dtype)
    if refusal is None and planes.format == "int4" and not gpu(device).narrow_products:
        # Triton would multiply without it, by way of 128 KB of shared memory: more than Turing or AMD's GPUs have.
        return "int4's kernel needs the matrix unit of NVIDIA's compute capability 8.0"
    return refusal


def shape_refusal(x_TK: torch.Tensor, planes: Planes, norm: Norm | None = None) -> str | None:
    """gemv_refusal without the device: what the interpreter, too, cannot take."""
    if x_TK.shape[0] > planes.most_rows:
        return f"{x_TK.shape[0]} rows, and the kernel takes {planes.most_rows}"
    if x_TK.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype is {x_TK.dtype}"
    if x_TK.shape[1] > 1 and x_TK.stride(1) != 1:
        return "a row of x has gaps"
    if planes.format not in FORMATS:
        return f"no tile unpack for {planes.format}"
    if planes.format == "dense" and planes.values.dtype != x_TK.dtype:
        return f"weight is {planes.values.dtype}, x {x_TK.dtype}"
    if planes.format in ("int8", "fp8") and planes.shape[1] % 4:
        return f"{planes.shape[1]} columns are no whole words"
    if planes.format == "int4" and planes.group not in GROUPS:
        return f"groups of {planes.group}, and the kernel takes {GROUPS}"
    return None if norm is None else norm_shape_refusal(x_TK)


def fuses_norm(x_TK: torch.Tensor, planes: Planes) -> bool:
    """Whether an RMS norm costs less inside the product than by a kernel of its own."""
    rows, columns = planes.shape
    return rows * columns <= FUSED_NORM and planes.format != "int4" and _kernel_rows(x_TK, planes) == 1


def gemv(
    x_TK: torch.Tensor,
    planes: Planes,
    *,
    norm: Norm | None = None,
    epilogue: Epilogue = PLAIN,
    launch: Launch | None = None,
) -> torch.Tensor:
    """[T, outputs] in x's dtype, the same at every call. x may have any row stride. `norm`: inside the kernel for one
    row of dense, int8 or fp8, otherwise by its own (fuses_norm says when that pays). `launch`: choose_launch's if None.

    On compute capability 9.0 and up it starts while the kernel before it on the stream still runs (programmatic
    dependent launch): weights are fetched at once, x and everything else only when that kernel is done.
    """
    T, N = x_TK.shape[0], planes.shape[0]
    y_TN = x_TK.new_empty((T, N // 2 if epilogue.gated else N))
    if y_TN.numel() == 0:
        return y_TN
    device = gpu(x_TK.device)
    rows = _kernel_rows(x_TK, planes)
    if norm is not None and (rows > 1 or planes.format == "int4"):
        x_TK = norm_rows(x_TK, norm.weight_K, None, norm.eps, centred=False)
    launch = launch or _choose(planes, rows, device)
    if rows == 1 and planes.format == "int4":
        _int4(x_TK, planes, epilogue, launch, device, y_TN)
    elif rows == 1:
        _one_row(x_TK, planes, norm, epilogue, launch, device, y_TN)
    else:
        _several_rows(x_TK, planes, epilogue, launch, device, y_TN)
    return y_TN


def _one_row(
    x_TK: torch.Tensor,
    planes: Planes,
    norm: Norm | None,
    epilogue: Epilogue,
    launch: Launch,
    device: GPU,
    y_TN: torch.Tensor,
) -> None:
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    from paceline.kernels.gemv_row_triton import gemv_row_kernel

    gemv_row_kernel[(-(-planes.shape[0] // launch.block_n),)](
        x_ptr=x_TK,
        w_ptr=planes.values if planes.format == "dense" else planes.values.view(BYTES[planes.format]),
        scale_ptr=planes.scale,
        FORMAT=planes.format,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        ASM=device.ptx,
        num_warps=launch.warps,
        K=planes.shape[1],
        norm_ptr=None if norm is None else norm.weight_K,
        eps=0.0 if norm is None else norm.eps,
        expert_ptr=None,
        SHARE=1,
        **_after(planes, epilogue, device, y_TN),
    )


def _several_rows(
    x_TK: torch.Tensor,
    planes: Planes,
    epilogue: Epilogue,
    launch: Launch,
    device: GPU,
    y_TN: torch.Tensor,
) -> None:
    from paceline.kernels.gemm_triton import add_parts_kernel

    T, N = x_TK.shape[0], planes.shape[0]
    # Allocated here: in a captured graph all layers then share one piece of the graph's pool.
    parts = None if launch.split == 1 else x_TK.new_empty((launch.split, T, N), dtype=torch.float32)
    after = _after_rows(planes, epilogue, device, y_TN) | {"parts_ptr": parts, "T": T}
    _multiply(x_TK, planes, launch, device, after)
    if parts is not None:
        add_parts_kernel[(T, -(-y_TN.shape[1] // PARTS_BLOCK))](
            BLOCK=PARTS_BLOCK, SPLIT=launch.split, num_warps=PARTS_BLOCK // 128, **after
        )


def _choose(planes: Planes, rows: int, device: GPU) -> Launch:
    return choose_launch(Product(planes.format, planes.shape, rows, planes.group), device.name, device.processors)


def product_parts(x_TK: torch.Tensor, planes: Planes, launch: Launch | None = None) -> torch.Tensor:
    """x w^T of several rows as float32 [split, T, N], of which it is the sum: for whoever reads it next and can add.
    Otherwise as gemv."""
    launch = launch or _choose(planes, launch_rows(max(2, x_TK.shape[0])), gpu(x_TK.device))
    parts_PTN = x_TK.new_empty((launch.split, x_TK.shape[0], planes.shape[0]), dtype=torch.float32)
    if parts_PTN.numel():
        device = gpu(x_TK.device)
        after = _after_rows(planes, PLAIN, device, parts_PTN[0]) | {"parts_ptr": parts_PTN, "T": x_TK.shape[0]}
        _multiply(x_TK, planes, launch, device, after)
    return parts_PTN


def _multiply(x_TK: torch.Tensor, planes: Planes, launch: Launch, device: GPU, after: dict[str, Any]) -> None:
    from paceline.kernels.gemm_triton import gemm_kernel

    block_m = min(launch.block_m, launch_rows(max(2, x_TK.shape[0])))  # one row too, where its bytes are taken apart
    gemm_kernel[(-(-x_TK.shape[0] // block_m), -(-planes.shape[0] // launch.block_n), launch.split)](
        **weight_arguments(planes, launch, device, x_TK.dtype),
        x_ptr=x_TK,
        x_stride=x_TK.stride(0),
        K=x_TK.shape[1],
        M=block_m,
        BLOCK_N=launch.block_n,
        STAGES=launch.stages,
        PREFETCH=launch.prefetch,
        num_warps=launch.warps,
        expert_ptr=None,
        row_ptr=None,
        SHARE=1,
        **after,
    )


def _after_rows(planes: Planes, epilogue: Epilogue, device: GPU, y_TN: torch.Tensor) -> dict[str, Any]:
    residual = epilogue.residual_TN
    return _after(planes, epilogue, device, y_TN) | {
        "y_stride": y_TN.stride(0),
        "residual_stride": 0 if residual is None else residual.stride(0),
    }


def weight_arguments(planes: Planes, launch: Launch, device: GPU, dtype: torch.dtype) -> dict[str, Any]:
    """gemm_kernel's for a weight, or for experts' weights one after the other."""
    scale = planes.scale
    if planes.format == "int4":
        assert scale is not None
        scale = scale.view(torch.int32)
    return {
        "w_ptr": planes.values,
        "w_stride": planes.values.stride(-2),
        "scale_ptr": scale,
        "FORMAT": planes.format,
        "GROUP": planes.group,
        "BLOCK_K": min(launch.block_k, 4 * planes.group) if planes.format == "int4" else launch.block_k,
        "SPLIT": launch.split,
        "ASM": device.ptx and dtype == torch.bfloat16,
    }


def _int4(
    x_TK: torch.Tensor,
    planes: Planes,
    epilogue: Epilogue,
    launch: Launch,
    device: GPU,
    y_TN: torch.Tensor,
) -> None:
    from paceline.kernels.gemv_int4_triton import gemv_int4_kernel

    assert planes.scale is not None
    halves = planes.values.view(torch.int16)
    gemv_int4_kernel[(-(-planes.shape[0] // launch.block_n),)](
        w_ptr=halves,
        w_stride=halves.stride(0),
        scale_ptr=planes.scale.view(torch.int32),
        GROUP=planes.group,
        x_ptr=x_TK,
        K=x_TK.shape[1],
        BLOCK_N=launch.block_n,
        WARPS=launch.warps,
        STAGES=launch.stages,
        PREFETCH=launch.prefetch,
        ASM=device.ptx,
        num_warps=launch.warps,
        **_after(planes, epilogue, device, y_TN),
    )


def _after(planes: Planes, epilogue: Epilogue, device: GPU, y_TN: torch.Tensor) -> dict[str, Any]:
    """Every kernel's arguments for what follows the product."""
    return {
        "bias_ptr": epilogue.bias_N,
        "ACTIVATION": epilogue.activation or "none",
        "GATED": epilogue.gated,
        "residual_ptr": epilogue.residual_TN,
        "y_ptr": y_TN,
        "N": planes.shape[0],
        "PDL": device.dependent,
        **launch_options(device.dependent),
    }


def _kernel_rows(x_TK: torch.Tensor, planes: Planes) -> int:
    """1 where a kernel for one row takes x, else the rows that the matrix unit sees."""
    # Without Triton's loads of fp8 its bytes are taken apart, which is done for the matrix unit alone.
    bytes_apart = planes.format == "fp8" and not gpu(x_TK.device).fp8
    return launch_rows(max(x_TK.shape[0], 2 if bytes_apart else 1))
