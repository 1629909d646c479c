"""A mixture of experts (Shazeer et al., 2017; routed as in Mixtral, Jiang et al., 2024).

Shapes: T tokens, D hidden size, E experts, A active experts a token, P = T * A pairs of a token and an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from paceline.config import MoeConfig
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
    """The sum of each token's experts, weighted by the router. `experts`: one module [T, D] -> [T, D] each.

    Tokens are sorted by expert, so that an expert reads its weights once a step; a token's sum is taken in the order
    of its own choices, so its neighbours change nothing. One read of the device a layer: how many tokens each has.
    """

    def __init__(self, config: MoeConfig, router_ED: torch.Tensor, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.router_ED = router_ED
        self.experts = nn.ModuleList(experts)

    def forward(
        self, x_TD: torch.Tensor, *, norm: Norm | None = None, residual_TD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`residual + experts(norm(x))`; without `norm` and `residual_TD` there is no such step."""
        if norm is not None:
            x_TD = norm(x_TD)
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

    def extra_repr(self) -> str:
        return f"{self.config.experts_per_token} of {self.config.num_experts} experts"
