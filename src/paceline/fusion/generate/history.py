"""What each step of a generation leaves for its result: scores and logits, where they are asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from paceline.fusion.generate.request import Request


@dataclass(frozen=True)
class History:
    request: Request
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def add(self, scores_RV: torch.Tensor, logits_RV: torch.Tensor) -> None:
        if self.request.scores:
            self.scores.append(scores_RV)
        if self.request.logits:
            self.logits.append(logits_RV)

    def result(self, surplus: int) -> dict[str, object]:
        """`scores` and `logits` without the last `surplus` steps; None for what was not asked for."""
        return {
            "scores": tuple(self.scores[: len(self.scores) - surplus]) if self.request.scores else None,
            "logits": tuple(self.logits[: len(self.logits) - surplus]) if self.request.logits else None,
        }
