"""paceline: transformer language models, fast, in native PyTorch and Triton.

The names below are the whole public surface. They load on first use, so that `import paceline` stays free of torch
(`python -X importtime -c "import paceline"`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paceline.config import SpeculativeConfig
    from paceline.errors import PacelineError, UsageError
    from paceline.fusion import optimize
    from paceline.llm import LLM
    from paceline.outputs import (
        ClassificationRequestOutput,
        CompletionOutput,
        EmbeddingRequestOutput,
        RankedDocument,
        RequestOutput,
        ScoringRequestOutput,
    )
    from paceline.planner.inference import plan
    from paceline.sampling.params import BeamSearchParams, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "BeamSearchParams",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "PacelineError",
    "RankedDocument",
    "RequestOutput",
    "SamplingParams",
    "ScoringRequestOutput",
    "SpeculativeConfig",
    "UsageError",
    "__version__",
    "optimize",
    "plan",
]

_HOME = {
    "LLM": "paceline.llm",
    "BeamSearchParams": "paceline.sampling.params",
    "ClassificationRequestOutput": "paceline.outputs",
    "CompletionOutput": "paceline.outputs",
    "EmbeddingRequestOutput": "paceline.outputs",
    "PacelineError": "paceline.errors",
    "RankedDocument": "paceline.outputs",
    "RequestOutput": "paceline.outputs",
    "SamplingParams": "paceline.sampling.params",
    "ScoringRequestOutput": "paceline.outputs",
    "SpeculativeConfig": "paceline.config",
    "UsageError": "paceline.errors",
    "optimize": "paceline.fusion",
    "plan": "paceline.planner.inference",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'paceline' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
