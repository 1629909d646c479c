"""What may be asked of optimize()."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from paceline.config import QUANTIZATIONS
from paceline.errors import UsageError
from paceline.registry import unknown

LEVELS = ("safe", "fast")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """`dtype`: compute with a copy of the weights in it; None: with the model's own. `level`: "safe" notices each
    change of the model and computes every position as the model does; "fast" takes the model's attributes and weights
    as they were when they were captured, and computes nothing where the attention mask has padding. `quantize`: store
    linears' weights in this format; None: as they are. `graphs`: on a GPU, capture calls in CUDA graphs.
    `compile_rest`: give what no pass replaces to torch.compile."""

    dtype: torch.dtype | None = None
    level: Literal["safe", "fast"] = "safe"
    quantize: str | None = None
    graphs: bool = True
    compile_rest: bool = False

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise UsageError(unknown("level", self.level, LEVELS))
        if self.quantize is not None and self.quantize not in QUANTIZATIONS:
            raise UsageError(unknown("quantize", self.quantize, QUANTIZATIONS))
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(map(str, DTYPES))} or None, got {self.dtype!r}")
