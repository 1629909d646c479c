from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paceline.llm import LLM


@pytest.fixture(scope="session")
def tiny_embedder(
    tmp_path_factory: pytest.TempPathFactory, save_tiny_bert: Callable[..., Path], sentence_files: Callable[..., Any]
) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("tiny_embedder"), files=sentence_files())


@pytest.fixture(scope="session")
def embedder(tiny_embedder: Path) -> Iterator[LLM]:
    with LLM(str(tiny_embedder), dtype="float32", device="cpu", mode="eager") as llm:
        yield llm


@pytest.fixture(scope="session")
def hidden_states() -> Callable[[Path, list[int]], Any]:
    """transformers' own last hidden states of one text, [L, D] float32."""
    import torch
    import transformers

    def run(directory: Path, ids: list[int]) -> Any:
        model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.inference_mode():
            return model(input_ids=torch.tensor([ids])).last_hidden_state[0]

    return run
