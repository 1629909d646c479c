"""An LLM of random weights, for the engines of both benchmarks."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from paceline.llm import LLM


def random_llm(config: Mapping[str, Any], weight_format: str, device: torch.device, **options: Any) -> LLM:
    """Of the model that `config`, a config.json's contents, describes; raises what LLM raises."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(dict(config)))
        return LLM(
            str(path),
            load_format="dummy",
            model_impl="paceline",
            skip_tokenizer_init=True,
            device=str(device),
            quantization=None if weight_format == "dense" else weight_format,
            **options,
        )
