"""A mixture of experts on the device: who goes where is decided, sorted and multiplied without the host knowing.

`mixture` runs Triton's kernels where `experts_refusal` finds nothing against it; layers/moe.py is its plain twin. All
experts' weights are one tensor. Pairs of a token and an expert are put into groups of M that share an expert, and each
group goes through kernels/gemm_triton.py once: an expert with up to M tokens is read once, and as many groups are
launched as there could be, of which those without an expert end at once. One token's pairs need no groups: each reads
its expert's weight through kernels/gemv_row_triton.py.

Shapes: T tokens, D hidden size, I inner size, E experts, A active ones a token, P = T * A pairs, G groups of M pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from paceline.kernels.gemv import BYTES, PARTS_BLOCK, Planes, device_refusal, weight_arguments
from paceline.kernels.gemv_launch import Launch, Product, choose_launch, experts_launch
from paceline.kernels.gpu import GPU, gpu, launch_options

MOST_EXPERTS = 512
# Pairs up to which one program groups them, some 64 at a step; a prompt's are sorted by torch.
GROUPED_PAIRS = 4096
ROUTER_BLOCK = 128  # channels at once
MOST_GROUP = 128  # pairs


@dataclass(frozen=True)
class Experts:
    """Gated MLPs without biases. `gate_up`, of shape (2 I, D) with gate's rows first, and `down`, (D, I), hold E
    matrices each: values [E, N, ...] and scale [E, N, ...], otherwise as Planes has them."""

    gate_up: Planes
    down: Planes
    activation: str

    @property
    def number(self) -> int:
        return self.down.values.shape[0]


@dataclass(frozen=True)
class Groups:
    expert_G: torch.Tensor  # int32, -1 for a group without pairs
    pair_GM: torch.Tensor  # int32, -1 where there is none


def stack_planes(planes: Sequence[Planes]) -> Planes:
    """One tensor of several matrices of a kind, a copy."""
    first = planes[0]
    scale = None
    if first.scale is not None:
        scale = torch.stack([one.scale for one in planes if one.scale is not None])
    return replace(first, values=torch.stack([one.values for one in planes]), scale=scale)


def experts_refusal(x_TD: torch.Tensor, experts: Experts) -> str | None:
    """Why the kernels cannot take such a mixture; None when they can."""
    return experts_device_refusal(x_TD.device, x_TD.dtype, experts) or experts_shape_refusal(x_TD, experts)


def experts_device_refusal(device: torch.device, dtype: torch.dtype, experts: Experts) -> str | None:
    """experts_refusal without the shape of x."""
    refusals = (device_refusal(device, dtype, planes) for planes in (experts.gate_up, experts.down))
    return next(filter(None, refusals), None)


def experts_shape_refusal(x_TD: torch.Tensor, experts: Experts) -> str | None:
    """experts_refusal without the device: what the interpreter, too, cannot take."""
    if x_TD.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype is {x_TD.dtype}"
    if experts.number > MOST_EXPERTS:
        return f"{experts.number} experts, and the kernels take {MOST_EXPERTS}"
    if x_TD.shape[1] > 1 and x_TD.stride(1) != 1:
        return "a row of x has gaps"
    for planes in (experts.gate_up, experts.down):
        if planes.format == "dense" and planes.values.dtype != x_TD.dtype:
            return f"weight is {planes.values.dtype}, x {x_TD.dtype}"
    return None


def mixture(
    x_TD: torch.Tensor,
    router_ED: torch.Tensor,
    experts: Experts,
    *,
    active: int,
    normalize: bool,
    residual_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual + the weighted sum of each token's `active` likeliest experts; [T, D] in x's dtype, the same at every
    call. Nothing waits for the device: it can be captured in a graph."""
    if x_TD.shape[0] == 0:
        return torch.empty_like(x_TD)
    experts_TA, weights_TA = route_tokens(x_TD, router_ED, active, normalize=normalize)
    if x_TD.shape[0] == 1 and experts.gate_up.format != "int4" and experts.down.format != "int4":
        inner_PI = _one_token(x_TD, experts.gate_up, experts_TA, experts.activation)
        parts = _one_token(inner_PI, experts.down, experts_TA, None)[None]
    else:
        parts = _grouped(x_TD, experts, experts_TA)
    return _mix(parts, weights_TA, residual_TD, x_TD.dtype)


def route_tokens(
    x_TD: torch.Tensor, router_ED: torch.Tensor, active: int, *, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts, the likeliest first, and their weights: int32 and float32, [T, A]."""
    from paceline.kernels.experts_triton import route_kernel

    (T, D), E, device = x_TD.shape, router_ED.shape[0], gpu(x_TD.device)
    experts_TA = torch.empty((T, active), dtype=torch.int32, device=x_TD.device)
    weights_TA = torch.empty((T, active), dtype=torch.float32, device=x_TD.device)
    route_kernel[(T,)](
        x_ptr=x_TD,
        router_ptr=router_ED,
        expert_ptr=experts_TA,
        weight_ptr=weights_TA,
        x_stride=x_TD.stride(0),
        D=D,
        E=E,
        A=active,
        NORMALIZE=normalize,
        BLOCK_E=_power(E),
        BLOCK_D=ROUTER_BLOCK,
        num_warps=4 if E <= 64 else 8,
        **_dependent(device),
    )
    return experts_TA, weights_TA


def most_groups(pairs: int, experts: int, rows: int) -> int:
    """Of `rows` pairs each, as many as there could be: each of min(E, P) experts begins one, and P // M fill up."""
    return min(pairs, min(experts, pairs) + pairs // rows)


def group_rows(pairs: int, experts: int) -> int:
    """Pairs of a group: twice the mean, so that most experts take one group; a power of two from 16 on."""
    return min(MOST_GROUP, max(16, _power(-(-2 * pairs // experts))))


def group_pairs(experts_P: torch.Tensor, experts: int, rows: int) -> Groups:
    """Each expert's pairs in their order, from the start of a group on."""
    from paceline.kernels.experts_triton import group_kernel

    pairs = experts_P.shape[0]
    if pairs > GROUPED_PAIRS:
        return group_pairs_ref(experts_P, experts, rows)
    groups = most_groups(pairs, experts, rows)
    expert_G = torch.empty(groups, dtype=torch.int32, device=experts_P.device)
    pair_GM = torch.empty((groups, rows), dtype=torch.int32, device=experts_P.device)
    group_kernel[(1,)](
        expert_ptr=experts_P,
        group_ptr=expert_G,
        row_ptr=pair_GM,
        P=pairs,
        G=groups,
        M=rows,
        E=experts,
        BLOCK_E=_power(experts),
        BLOCK=64,
        num_warps=4 if experts <= 64 else 8,
        **_dependent(gpu(experts_P.device)),
    )
    return Groups(expert_G, pair_GM)


def group_pairs_ref(experts_P: torch.Tensor, experts: int, rows: int) -> Groups:
    """The same by torch, on the device too."""
    pairs, device = experts_P.shape[0], experts_P.device
    groups = most_groups(pairs, experts, rows)
    expert_P, pair_P = experts_P.long().sort(stable=True)
    counts_E = torch.zeros(experts, dtype=torch.int64, device=device).scatter_add_(0, expert_P, torch.ones_like(pair_P))
    groups_E = (counts_E + rows - 1) // rows
    ends_E = groups_E.cumsum(0)
    first_P = (counts_E.cumsum(0) - counts_E)[expert_P]
    place_P = (ends_E - groups_E)[expert_P] * rows + torch.arange(pairs, device=device) - first_P
    pair_GM = torch.full((groups, rows), -1, dtype=torch.int32, device=device)
    pair_GM.view(-1)[place_P] = pair_P.int()
    expert_G = torch.searchsorted(ends_E, torch.arange(groups, device=device), right=True)
    return Groups(torch.where(expert_G < experts, expert_G, -1).int(), pair_GM)


def _one_token(x_TD: torch.Tensor, planes: Planes, experts_TA: torch.Tensor, activation: str | None) -> torch.Tensor:
    """[A, outputs]: one token's rows of x, one for all or one for each, through its experts."""
    from paceline.kernels.gemv_row_triton import gemv_row_kernel

    device, active, (N, K) = gpu(x_TD.device), experts_TA.shape[1], planes.shape
    launch = choose_launch(Product(planes.format, planes.shape, 1), device.name, device.processors)
    y_PN = x_TD.new_empty((active, N if activation is None else N // 2))
    gemv_row_kernel[(-(-N // launch.block_n), active)](
        x_ptr=x_TD.contiguous(),
        w_ptr=planes.values if planes.format == "dense" else planes.values.view(BYTES[planes.format]),
        scale_ptr=planes.scale,
        norm_ptr=None,
        bias_ptr=None,
        residual_ptr=None,
        y_ptr=y_PN,
        expert_ptr=experts_TA,
        N=N,
        eps=0.0,
        SHARE=active // x_TD.shape[0],
        K=K,
        FORMAT=planes.format,
        ACTIVATION=activation or "none",
        GATED=activation is not None,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        ASM=device.ptx,
        num_warps=launch.warps,
        **_dependent(device),
    )
    return y_PN


def _grouped(x_TD: torch.Tensor, experts: Experts, experts_TA: torch.Tensor) -> torch.Tensor:
    """The experts' answers, [1, P, D] in x's dtype, or in parts, float32 [SPLIT, P, D]."""
    from paceline.kernels.gemm_triton import add_parts_kernel

    pairs, active = experts_TA.numel(), experts_TA.shape[1]
    groups = group_pairs(experts_TA.view(-1), experts.number, group_rows(pairs, experts.number))
    up = experts.gate_up
    inner_PI = _group_product(x_TD, up, groups, experts.activation, pairs, active)
    if inner_PI.shape[0] == 1:
        inner_PI = inner_PI[0]
    else:
        parts, inner_PI = inner_PI, x_TD.new_empty((pairs, up.shape[0] // 2))
        add_parts_kernel[(pairs, -(-inner_PI.shape[1] // PARTS_BLOCK))](
            parts_ptr=parts,
            bias_ptr=None,
            residual_ptr=None,
            y_ptr=inner_PI,
            T=pairs,
            N=up.shape[0],
            y_stride=inner_PI.stride(0),
            residual_stride=0,
            ACTIVATION=experts.activation,
            GATED=True,
            BLOCK=PARTS_BLOCK,
            SPLIT=parts.shape[0],
            num_warps=PARTS_BLOCK // 128,
            **_dependent(gpu(x_TD.device)),
        )
    return _group_product(inner_PI, experts.down, groups, None, pairs, 1)


def _group_product(
    x_RK: torch.Tensor, planes: Planes, groups: Groups, activation: str | None, pairs: int, share: int
) -> torch.Tensor:
    """[1, P, outputs] in x's dtype, or float32 [SPLIT, P, N] before the activation."""
    from paceline.kernels.gemm_triton import gemm_kernel

    device, (N, K), (G, M) = gpu(x_RK.device), planes.shape, groups.pair_GM.shape
    launch = _launch(planes, groups, device)
    outputs, dtype = (N if activation is None else N // 2), x_RK.dtype
    y = x_RK.new_empty(
        (1, pairs, outputs) if launch.split == 1 else (launch.split, pairs, N),
        dtype=dtype if launch.split == 1 else torch.float32,
    )
    gemm_kernel[(G, -(-N // launch.block_n), launch.split)](
        **weight_arguments(planes, launch, device, dtype),
        x_ptr=x_RK,
        bias_ptr=None,
        residual_ptr=None,
        y_ptr=y,
        parts_ptr=None if launch.split == 1 else y,
        expert_ptr=groups.expert_G,
        row_ptr=groups.pair_GM,
        T=pairs,
        N=N,
        x_stride=x_RK.stride(0),
        y_stride=outputs,
        residual_stride=0,
        SHARE=share,
        K=K,
        ACTIVATION=activation or "none",
        GATED=activation is not None,
        M=M,
        BLOCK_N=launch.block_n,
        STAGES=launch.stages,
        PREFETCH=0,
        num_warps=launch.warps,
        **_dependent(device),
    )
    return y


def _launch(planes: Planes, groups: Groups, device: GPU) -> Launch:
    """Split as if every group had an expert: how many have is known to the device alone."""
    G, M = groups.pair_GM.shape
    return experts_launch(Product(planes.format, planes.shape, M, planes.group), G, device.processors)


def _mix(
    parts: torch.Tensor, weights_TA: torch.Tensor, residual_TD: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    from paceline.kernels.experts_triton import mix_kernel

    split, pairs, D = parts.shape
    T, A = weights_TA.shape
    y_TD = torch.empty((T, D), dtype=dtype, device=parts.device)
    mix_kernel[(T, -(-D // PARTS_BLOCK))](
        parts_ptr=parts,
        weight_ptr=weights_TA,
        residual_ptr=residual_TD,
        y_ptr=y_TD,
        P=pairs,
        residual_stride=0 if residual_TD is None else residual_TD.stride(0),
        D=D,
        A=A,
        SPLIT=split,
        BLOCK=PARTS_BLOCK,
        num_warps=PARTS_BLOCK // 128,
        **_dependent(gpu(parts.device)),
    )
    return y_TD


def _dependent(device: GPU) -> dict[str, Any]:
    return {"PDL": device.dependent, **launch_options(device.dependent)}


def _power(number: int) -> int:
    """The power of two from `number` on."""
    return 1 << (number - 1).bit_length()
