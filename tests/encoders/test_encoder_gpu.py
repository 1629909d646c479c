"""Encoders on a GPU say what they say on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paceline.llm import LLM

TEXTS = ["fox", "a b c d e f g h", "jumps over . fox", "z", "fox fox jump over over a b c d e f g h i j k l m"] * 9


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "mode"), [("float32", "eager"), ("float32", "auto"), ("auto", "auto")])
def test_the_same_embeddings_as_on_the_cpu(dtype: str, mode: str, embedder: LLM, tiny_embedder: Path) -> None:
    expected = np.array([output.outputs.embedding for output in embedder.embed(TEXTS)])
    with LLM(str(tiny_embedder), dtype=dtype, mode=mode, device="cuda") as llm:
        found = np.array([output.outputs.embedding for output in llm.embed(TEXTS)])
        alone = np.array([llm.embed(text)[0].outputs.embedding for text in TEXTS[:5]])
    least = 0.999 if dtype == "auto" else 0.99999
    assert (found * expected).sum(-1).min() > least
    assert (alone * expected[:5]).sum(-1).min() > least
