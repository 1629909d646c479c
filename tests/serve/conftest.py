"""A tiny model for servers, and what drives their clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from paceline.config import CacheConfig, SchedulerConfig
from paceline.engine.load_options import LoadOptions
from paceline.sampling.params import SamplingParams
from paceline.serve.client import AnswerUpdate, EngineClient, GenerateRequest

T = TypeVar("T")

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
CONTEXT = 512


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory, save_tiny_llama: Callable[[Path, int, int], None]) -> Path:
    """A 2-layer Llama without a tokenizer: 64 tokens, a context of 4096, so that a request can run for long."""

    directory = tmp_path_factory.mktemp("tiny_weights")
    save_tiny_llama(directory, 64, 4096)
    return directory


@pytest.fixture(scope="session")
def tiny_chat_model(
    tmp_path_factory: pytest.TempPathFactory, save_tiny_llama: Callable[[Path, int, int], None]
) -> Path:
    """A 2-layer Llama over single bytes, so that it can read and write any text, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory = tmp_path_factory.mktemp("tiny_chat_model")
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    save_tiny_llama(directory, len(words), CONTEXT)
    (directory / "generation_config.json").unlink(missing_ok=True)
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "</s>"}))
    return directory


@pytest.fixture(scope="session")
def tiny_encoder(
    tmp_path_factory: pytest.TempPathFactory, save_tiny_bert: Callable[..., Path], sentence_files: Callable[..., Any]
) -> Path:
    """A 2-layer BERT that embeds letters and a few words, 32 tokens at most."""
    return save_tiny_bert(tmp_path_factory.mktemp("tiny_encoder"), files=sentence_files())


@pytest.fixture(scope="session")
def tiny_cross_encoder(tmp_path_factory: pytest.TempPathFactory, save_tiny_bert: Callable[..., Path]) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("tiny_cross_encoder"), classes=1)


@pytest.fixture(scope="module")
def run_async() -> Iterator[Callable[[Coroutine[Any, Any, T]], T]]:
    """Run a coroutine on the module's own event loop, for a minute at most: what waits for ever fails instead."""
    loop = asyncio.new_event_loop()

    def run(coroutine: Coroutine[Any, Any, T]) -> T:
        return loop.run_until_complete(asyncio.wait_for(coroutine, 60))

    yield run
    loop.close()


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    """Wait for a condition; the test's own limit ends it."""

    async def wait(condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.005)

    return wait


@pytest.fixture(scope="session")
def tiny_options(tiny_weights: Path) -> Callable[..., LoadOptions]:
    """The tiny model with room for 8 requests at once, and no prefix cache: blocks that are used are requests'."""

    def make(max_num_seqs: int = 8, num_blocks: int = 2048, **others: Any) -> LoadOptions:
        return LoadOptions(
            str(tiny_weights),
            device="cpu",
            skip_tokenizer_init=True,
            cache=CacheConfig(block_size=4, num_blocks=num_blocks, enable_prefix_caching=False),
            scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=64),
            **others,
        )

    return make


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
