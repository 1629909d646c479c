"""y = norm(x) w^T for a few rows, with what follows it, reading the weight once in the form it is stored in.

`gemv_ref` composes plain torch ops and takes anything; `gemv` is the Triton kernel (kernels/gemv_triton.py), for up to
16 rows on CUDA where `gemv_refusal` finds nothing against it.

Shapes: T rows of x, N rows of the weight, K columns; outputs are N, or N / 2 where gate and up make one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from paceline.kernels.activation import activate, gated
from paceline.kernels.gpu import gpu, triton_refusal
from paceline.kernels.linear import linear_ref
from paceline.kernels.norm import rms_norm

MAX_ROWS = 16
FORMATS = ("dense", "int8", "fp8", "int4")
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Planes:
    """A weight as the kernel reads it.

    dense: values [N, K] in x's dtype. int8 and fp8 (e4m3): values [N, K / 4], int32 words of 4 values in memory order,
    scale [N]. int4, w = (q - 8) * scale + offset: values int32 [N, tiles * group / 2] and scale bfloat16
    [N, tiles * 4, 2], (scale, offset) of each group, for whole tiles of 4 groups (formats/int4.py has the words'
    order). Every tensor contiguous.
    """

    format: str
    shape: tuple[int, int]
    values: torch.Tensor
    scale: torch.Tensor | None = None
    group: int = 0


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


@dataclass(frozen=True)
class Launch:
    """block_n: rows of the weight a program (even where gate and up make one, 16 and up on the matrix unit); block_k:
    columns a step (int4: four groups a warp, whatever it says); split: programs that share a row's columns (int4: 1);
    prefetch: steps of the weight that a dependent launch asks for before x is awaited."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    split: int = 1
    prefetch: int = 1


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
    return triton_refusal(x_TK.device, x_TK.dtype) or shape_refusal(x_TK, planes, norm)


def shape_refusal(x_TK: torch.Tensor, planes: Planes, norm: Norm | None = None) -> str | None:
    """gemv_refusal without the device: what the interpreter, too, cannot take."""
    if x_TK.shape[0] > MAX_ROWS:
        return f"{x_TK.shape[0]} rows, and the kernel takes {MAX_ROWS}"
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
    if norm is not None and x_TK.dtype != torch.bfloat16:
        return "x times the norm's weight, before it is divided, may pass float16's largest number"
    return None


def gemv(
    x_TK: torch.Tensor,
    planes: Planes,
    *,
    norm: Norm | None = None,
    epilogue: Epilogue = PLAIN,
    launch: Launch | None = None,
) -> torch.Tensor:
    """[T, outputs] in x's dtype, the same at every call. x may have any row stride. `launch`: choose_launch's if None.

    On compute capability 9.0 and up it starts while the kernel before it on the stream still runs (programmatic
    dependent launch): weights are fetched at once, x and everything else only when that kernel is done.
    """
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    import triton

    from paceline.kernels.gemv_int4_triton import gemv_int4_kernel
    from paceline.kernels.gemv_triton import add_parts_kernel, gemv_kernel

    T, K = x_TK.shape
    N = planes.shape[0]
    y_TN = x_TK.new_empty((T, N // 2 if epilogue.gated else N))
    if y_TN.numel() == 0:
        return y_TN
    device = gpu(x_TK.device)
    # Without Triton's loads of fp8 its bytes are taken apart, which is done for the matrix unit alone: as for two rows.
    rows = max(T, 2) if planes.format == "fp8" and not device.fp8 else T
    launch = launch or choose_launch(planes, rows, device.name, device.processors)
    columns = _columns(rows, planes.format)
    values, scale = _as_read(planes, columns)
    after = _after(scale, epilogue, y_TN) | {
        "eps": 0.0 if norm is None else norm.eps,
        "K": K,
        "N": N,
        "M": columns,
        "PDL": device.dependent,
        **({"launch_pdl": True} if device.dependent else {}),
    }
    product: dict[str, Any] = {
        "x_ptr": x_TK,
        "w_ptr": values,
        "norm_ptr": None if norm is None else norm.weight_K,
        "x_stride": x_TK.stride(0),
        "w_stride": values.stride(0),
        "ROWS": 1 if T == 1 else columns,
        "BLOCK_N": launch.block_n,
        "STAGES": launch.stages,
        "PREFETCH": launch.prefetch,
        "ASM": device.ptx and (x_TK.dtype == torch.bfloat16 or planes.format == "int4"),
        "num_warps": launch.warps,
    }
    programs = triton.cdiv(N, launch.block_n)
    if planes.format == "int4":
        gemv_int4_kernel[(programs,)](GROUP=planes.group, WARPS=launch.warps, **product, **after)
        return y_TN
    # Allocated here: in a captured graph all layers then share one piece of the graph's pool.
    parts = None if launch.split == 1 else x_TK.new_empty((launch.split, N + 1, columns), dtype=torch.float32)
    after |= {"FORMAT": planes.format, "SPLIT": launch.split}
    gemv_kernel[(programs, launch.split)](parts_ptr=parts, BLOCK_K=launch.block_k, **product, **after)
    if parts is not None:
        block = 128 // columns
        add_parts_kernel[(triton.cdiv(N, block),)](
            parts_ptr=parts, NORM=norm is not None, BLOCK_N=block, num_warps=1, **after
        )
    return y_TN


def _as_read(planes: Planes, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values and scale in the types that the kernel loads for so many columns of the product."""
    if planes.format == "int4":
        assert planes.scale is not None
        return planes.values.view(torch.int16), planes.scale.view(torch.int32)
    if columns == 1 and planes.format in ("int8", "fp8"):
        return planes.values.view(torch.int8 if planes.format == "int8" else torch.float8_e4m3fn), planes.scale
    return planes.values, planes.scale


def _after(scale: torch.Tensor | None, epilogue: Epilogue, y_TN: torch.Tensor) -> dict[str, Any]:
    """The kernels' arguments for what follows the product."""
    residual = epilogue.residual_TN
    return {
        "scale_ptr": scale,
        "bias_ptr": epilogue.bias_N,
        "residual_ptr": residual,
        "y_ptr": y_TN,
        "T": y_TN.shape[0],
        "y_stride": y_TN.stride(0),
        "residual_stride": 0 if residual is None else residual.stride(0),
        "ACTIVATION": epilogue.activation or "none",
        "GATED": epilogue.gated,
    }


def _columns(rows: int, kind: str) -> int:
    """Columns of the product: the rows of x as plain sums or the matrix unit take them."""
    if rows == 1 and kind != "int4":
        return 1
    return 8 if rows <= 8 else 16


# One row, by device name, then by format and the weight's shape: Llama-3.1-8B's four linears, each over 32 layers of
# distinct weights in one graph, with dependent launch (docs/performance-log.md).
TUNED: Mapping[str, Mapping[tuple[str, int, int], Launch]] = MappingProxyType(
    {
        "NVIDIA H100 80GB HBM3": MappingProxyType(
            {
                ("dense", 6144, 4096): Launch(2, 2048, warps=4, stages=4),
                ("dense", 4096, 4096): Launch(2, 2048, warps=4, stages=4),
                ("dense", 28672, 4096): Launch(2, 2048, warps=4, stages=4),
                ("dense", 4096, 14336): Launch(2, 2048, warps=8, stages=4),
                ("int8", 6144, 4096): Launch(2, 1024, warps=2, stages=4),
                ("int8", 4096, 4096): Launch(8, 1024, warps=4, stages=4),
                ("int8", 28672, 4096): Launch(4, 1024, warps=4, stages=4),
                ("int8", 4096, 14336): Launch(2, 2048, warps=4, stages=4),
                ("fp8", 6144, 4096): Launch(4, 1024, warps=2, stages=3),
                ("fp8", 4096, 4096): Launch(4, 1024, warps=2, stages=3),
                ("fp8", 28672, 4096): Launch(4, 1024, warps=2, stages=3),
                ("fp8", 4096, 14336): Launch(4, 1024, warps=4, stages=3),
                ("int4", 6144, 4096): Launch(16, 512, warps=4, stages=2, prefetch=2),
                ("int4", 4096, 4096): Launch(16, 512, warps=8, stages=2),
                ("int4", 28672, 4096): Launch(16, 512, warps=2, stages=4, prefetch=2),
                ("int4", 4096, 14336): Launch(32, 512, warps=4, stages=4, prefetch=2),
            }
        )
    }
)
# One row of anything else: what did well at every shape above.
ONE_ROW: Mapping[str, Launch] = MappingProxyType(
    {
        "dense": Launch(2, 2048, warps=4, stages=4),
        "int8": Launch(4, 1024, warps=4, stages=4),
        "fp8": Launch(4, 1024, warps=2, stages=3),
        "int4": Launch(16, 512, warps=4, stages=3, prefetch=2),
    }
)
# Several rows: 16 rows of the weight a warp fill the matrix unit.
FEW_ROWS: Mapping[str, Launch] = MappingProxyType(
    {
        "dense": Launch(32, 256, warps=4, stages=4),
        "int8": Launch(64, 256, warps=4, stages=4),
        "fp8": Launch(64, 256, warps=4, stages=4),
        "int4": Launch(16, 512, warps=2, stages=2),
    }
)


def choose_launch(planes: Planes, rows: int, device_name: str, processors: int) -> Launch:
    """How to launch `rows` rows of x on a device of so many multiprocessors: tuned where we measured, else by rule.

    On the matrix unit K is split until every multiprocessor has two programs, since one waits for x at every step: the
    8B's down projection takes 62 us in 64 programs and 28 in 256.
    """
    columns = planes.shape[1]
    if rows == 1:
        tuned = TUNED.get(device_name, {}).get((planes.format, *planes.shape))
        if tuned is not None:
            return tuned
        launch = ONE_ROW[planes.format]
        if planes.format == "int4":
            return _with_work(launch, planes)
        return replace(launch, block_k=min(launch.block_k, 1 << max(columns - 1, 127).bit_length()))
    launch = FEW_ROWS[planes.format]
    if planes.format == "int4":
        return _with_work(launch, planes)
    programs, split = -(-planes.shape[0] // launch.block_n), 1
    while programs * split < 2 * processors and columns >= 4 * split * launch.block_k:
        split *= 2
    return replace(launch, split=split)


def _with_work(launch: Launch, planes: Planes) -> Launch:
    """For int4: no more warps than a row has tiles."""
    tiles = -(-planes.shape[1] // (4 * planes.group))
    return replace(launch, warps=min(launch.warps, 1 << (tiles - 1).bit_length()))
