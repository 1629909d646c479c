"""Jobs and results of small models, made by hand or by the worker itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from paceline.benchmark.job import Context, Job, Memory, Result
from paceline.benchmark.protocol import DECODED, Timing


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """A Llama of two layers, 61,760 values, untied."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 256,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


@pytest.fixture
def answer() -> Callable[..., Result]:
    """answer(job, tokens_per_second, bytes_per_token) -> a result that a worker could have given."""

    def make(job: Job, rate: float = 100.0, bytes_per_token: int = 10**9, **fields: Any) -> Result:
        contexts = tuple(
            Context(Timing(context, (0.02, 0.01, 0.09), (DECODED / rate,) * 3), bytes_per_token)
            for context in job.contexts
        )
        given = {
            "engine": job.engine,
            "version": None if job.engine == "paceline" else "1.2.3",
            "weight_format": job.weight_format,
            "dtype": "bfloat16",
            "device": "cuda:0",
            "machine": {"device": "H100", "torch": "2.11", "python": "3.12"},
            "contexts": contexts,
            "step_weight_bytes": 9 * 10**8,
            "head_bits": 16.0,
            "phases": {"process": 0.1, "import": 2.0},
            "memory": Memory({"weights": 2**30, "cache": 2**20}, {"weights": 2**30, "cache": 2**20}, 2**31),
            "bandwidth": 200e9,
        }
        return Result(**{**given, **fields})

    return make
