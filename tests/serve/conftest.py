"""A tiny model for servers, and what drives their clients."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from paceline.sampling.params import SamplingParams
from paceline.serve.client import AnswerUpdate, EngineClient, GenerateRequest

T = TypeVar("T")


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer Llama without a tokenizer: 64 tokens, a context of 4096, so that a request can run for long."""
    import transformers

    directory = tmp_path_factory.mktemp("tiny_weights")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        eos_token_id=2,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def run_async() -> Callable[[Awaitable[T]], T]:
    """Run a coroutine to its end, within a minute: a test that waits for ever fails instead."""

    def run(coroutine: Awaitable[T]) -> T:
        return asyncio.run(asyncio.wait_for(coroutine, 60))  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="session")
def make_request() -> Callable[..., GenerateRequest]:
    def make(request_id: str, prompt: tuple[int, ...] = (1, 5, 9), **params: Any) -> GenerateRequest:
        given = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "detokenize": False, **params}
        return GenerateRequest(request_id, prompt, SamplingParams(**given), frozenset({2}))

    return make


@pytest.fixture(scope="session")
def collect() -> Callable[..., Awaitable[dict[int, list[int]]]]:
    """The tokens of each answer of a request, submitted and read to its end."""

    async def collect(
        client: EngineClient, request: GenerateRequest, seen: Callable[[AnswerUpdate], None] | None = None
    ) -> dict[int, list[int]]:
        tokens: dict[int, list[int]] = {}
        async for one in await client.submit(request):
            tokens.setdefault(one.index, []).extend(one.update.new_token_ids)
            if seen is not None:
                seen(one)
        return tokens

    return collect
