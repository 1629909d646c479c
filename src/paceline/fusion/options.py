"""What may be asked of optimize()."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from paceline.errors import UsageError
from paceline.registry import unknown

LEVELS = ("safe", "fast")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """`dtype`: compute with a copy of the weights in it; None: with the model's own. `level`: "safe" notices each
    change of the model and computes every position as the model does; "fast" takes the model's attributes and weights
    as they were when they were captured, and computes nothing where the attention mask has padding."""

    dtype: torch.dtype | None = None
    level: Literal["safe", "fast"] = "safe"

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise UsageError(unknown("level", self.level, LEVELS))
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(map(str, DTYPES))} or None, got {self.dtype!r}")
