"""A mixture of experts (Shazeer et al., 2017; routed as in Mixtral, Jiang et al., 2024).

Shapes: T tokens, D hidden size, E experts, A active experts a token, P = T * A pairs of a token and an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from paceline import formats
from paceline.config import MoeConfig
from paceline.kernels.choices import Choice, either
from paceline.kernels.experts import (
    Experts,
    experts_device_refusal,
    experts_refusal,
    experts_shape_refusal,
    mixture,
    stack_planes,
)
from paceline.kernels.gemv import Planes
from paceline.layers.linear import Linear
from paceline.layers.mlp import GatedMLP
from paceline.layers.norm import Norm


def route(x_TD: torch.Tensor, router_ED: torch.Tensor, config: MoeConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts and their weights: int64 and float32, [T, A] each, the likeliest first.

    The softmax is over all experts and in float32; among equal scores torch's topk decides.
    """
    probs_TE = F.linear(x_TD, router_ED).softmax(dim=-1, dtype=torch.float32)
    weights_TA, experts_TA = probs_TE.topk(config.experts_per_token, dim=-1)
    if config.normalize:
        weights_TA = weights_TA / weights_TA.sum(dim=-1, keepdim=True)
    return experts_TA, weights_TA


class MoE(nn.Module):
    """The sum of each token's experts, weighted by the router.

    Tokens are sorted by expert, so that an expert reads its weights once a step; a token's sum is taken in the order
    of its own choices, so its neighbours change nothing. On CUDA all of it is done by kernels over the experts' stacked
    weights (kernels/experts.py); else by `plain`, their twin, which reads the device once: how many tokens each has.
    """

    def __init__(self, config: MoeConfig, router_ED: torch.Tensor, experts: Sequence[GatedMLP]) -> None:
        super().__init__()
        self.config = config
        self.router_ED = router_ED
        self.experts = nn.ModuleList(experts)
        self.stacked: Experts | None = None

    def stack(self) -> None:
        """Puts the experts' weights, where a kernel can read them, into one tensor each for all their gate_up and down;
        the experts then share its memory. Call it when their values are there; it holds one such tensor twice."""
        mlps = [mlp for mlp in self.experts if isinstance(mlp, GatedMLP)]
        gate_up = _stack([mlp.gate_up for mlp in mlps])
        down = _stack([mlp.down for mlp in mlps])
        if gate_up is not None and down is not None:
            self.stacked = Experts(gate_up, down, mlps[0].activation)

    def forward(
        self, x_TD: torch.Tensor, *, norm: Norm | None = None, residual_TD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`residual + experts(norm(x))`; without `norm` and `residual_TD` there is no such step."""
        if norm is not None:
            x_TD = norm(x_TD)
        if self.stacked is None or experts_refusal(x_TD, self.stacked) is not None:
            return self.plain(x_TD, residual_TD)
        active, normalize = self.config.experts_per_token, self.config.normalize
        return mixture(x_TD, self.router_ED, self.stacked, active=active, normalize=normalize, residual_TD=residual_TD)

    def plain(self, x_TD: torch.Tensor, residual_TD: torch.Tensor | None = None) -> torch.Tensor:
        """The same, one expert after the other."""
        experts_TA, weights_TA = route(x_TD, self.router_ED, self.config)
        expert_P, pair_P = experts_TA.flatten().sort(stable=True)
        counts = torch.bincount(expert_P, minlength=self.config.num_experts).tolist()
        sorted_PD = x_TD[pair_P // self.config.experts_per_token]
        shares = zip(self.experts, torch.split(sorted_PD, counts), strict=True)
        answers = [expert(rows_RD) for expert, rows_RD in shares if rows_RD.shape[0]]
        answer_PD = torch.empty_like(sorted_PD)
        answer_PD[pair_P] = torch.cat(answers)
        answer_TAD = answer_PD.view(*experts_TA.shape, -1)
        mixed_TD = (answer_TAD * weights_TA[:, :, None].to(x_TD.dtype)).sum(dim=1)
        return mixed_TD if residual_TD is None else residual_TD + mixed_TD

    def refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why the kernels do not take a mixture in `dtype`; None where they do."""
        if self.stacked is None:
            return "the experts' weights are in a layout that no kernel reads"
        like_x = torch.empty(1, self.router_ED.shape[1], dtype=dtype, device="meta")
        return experts_device_refusal(device, dtype, self.stacked) or experts_shape_refusal(like_x, self.stacked)

    def choices(self, dtype: torch.dtype, device: torch.device) -> list[Choice]:
        name = f"experts, {self.extra_repr()}"
        plain = "one after the other, their tokens counted by the host"
        return [Choice(name, *either(self.refusal(dtype, device), "Triton, routed and grouped on the device", plain))]

    def extra_repr(self) -> str:
        return f"{self.config.experts_per_token} of {self.config.num_experts} experts"


def _stack(linears: Sequence[Linear]) -> Planes | None:
    """One tensor of the linears' weights, which then lie in it; None where they are of several kinds, or of none."""
    planes = [linear.weight.planes for linear in linears if linear.weight.planes is not None]
    kinds = {(one.format, one.shape, one.group) for one in planes}
    if len(planes) < len(linears) or len(kinds) != 1:
        return None
    stacked = stack_planes(planes)
    for e, linear in enumerate(linears):
        scale = None if stacked.scale is None else stacked.scale[e]
        linear.weight = formats.over(linear.weight, replace(stacked, values=stacked.values[e], scale=scale))
    return stacked
