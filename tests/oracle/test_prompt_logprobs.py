"""A prompt's log probabilities are the log softmax of transformers' logits, whatever the machinery between does, and
a long prompt's never take more memory than the workspace."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from paceline import sizing
from paceline.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculativeConfig
from paceline.engine.engine import Engine, EngineRequest
from paceline.engine.model_runner import ModelRunner
from paceline.engine.step import RequestUpdate
from paceline.sampling.logprobs import TokenLogprobs
from paceline.sampling.params import SamplingParams

ERROR_BOUND = 1e-4  # of a log probability, in float32
ROOMY, TIGHT = 200, 14  # blocks of 4 tokens; TIGHT holds a third of the requests
VOCAB = 96


def make_engine(decoder: Any, *, blocks: int = ROOMY, chunk: int | None = None, **options: Any) -> Engine:
    config = EngineConfig(
        max_model_len=4096,
        cache=CacheConfig(4, blocks),
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64, max_chunk=chunk),
        **options,
    )
    counts = (blocks,) * len(decoder.kv_groups)
    return Engine(config, decoder.kv_groups, counts, ModelRunner(decoder, counts, 4))


def play(engine: Engine, requests: Sequence[EngineRequest]) -> dict[str, list[RequestUpdate]]:
    """All updates of each request, until the engine has nothing to do."""
    for request in requests:
        engine.add_request(request)
    updates: dict[str, list[RequestUpdate]] = {}
    while engine.has_work:
        for update in engine.step():
            updates.setdefault(update.request_id, []).append(update)
        engine.scheduler.check_invariants()
    return updates


def prompts() -> list[list[int]]:
    """Uneven lengths; some begin alike, so that one finds the other's blocks; one repeats itself, for the proposer."""
    generator = torch.Generator().manual_seed(3)
    head, loop = (torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in (17, 3))
    return [[7], [7, 9], head, [*head, 1, 2, 3], head, loop * 7]


def check(entries: Sequence[TokenLogprobs], prompt: Sequence[int], logits_TV: torch.Tensor, k: int) -> None:
    logprobs_TV = logits_TV.log_softmax(dim=-1)
    assert [entry.token_id for entry in entries] == list(prompt[1:])
    for entry, token, row in zip(entries, prompt[1:], logprobs_TV, strict=False):
        assert entry.logprob == pytest.approx(row[token].item(), abs=ERROR_BOUND)
        better = row > row[token] + ERROR_BOUND
        assert int(better.sum()) < entry.rank <= int((row > row[token] - ERROR_BOUND).sum()) + 1
        size = VOCAB if k < 0 else min(k, VOCAB)
        values = torch.tensor(list(entry.top.values()))
        torch.testing.assert_close(values, row.topk(size).values, rtol=0, atol=ERROR_BOUND)
        torch.testing.assert_close(values, row[list(entry.top)], rtol=0, atol=ERROR_BOUND)


def check_all(model: Any, updates: dict[str, list[RequestUpdate]], requests: Sequence[EngineRequest]) -> None:
    for request in requests:
        first = request.request_id if request.params.n == 1 else f"{request.request_id}#0"
        found = [update.prompt_logprobs for update in updates[first] if update.prompt_logprobs is not None]
        assert len(found) == 1
        k = request.params.num_prompt_logprobs
        check(found[0], request.prompt_token_ids, model.hf_logits(request.prompt_token_ids), k)
        for child in range(1, request.params.n):
            assert all(update.prompt_logprobs is None for update in updates[f"{request.request_id}#{child}"])
        for child in (
            [first] if request.params.n == 1 else [f"{request.request_id}#{i}" for i in range(request.params.n)]
        ):
            assert updates[child][-1].finish_reason == "length"
            assert sum(len(update.new_token_ids) for update in updates[child]) == request.params.max_tokens


def mixed(name: str) -> list[EngineRequest]:
    """Every k beside each other; one wants no token, one two answers."""
    ks = [0, 1, 3, -1, 10**6, 2]
    params = [SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=k, logprobs=1) for k in ks]
    params[2] = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=ks[2])
    params[4] = SamplingParams(n=2, seed=1, max_tokens=5, echo=True, logprobs=ks[4])
    return [EngineRequest(f"{name}{i}", p, one) for i, (p, one) in enumerate(zip(prompts(), params, strict=True))]


MACHINERY = list(itertools.product([1, 7, None], [ROOMY, TIGHT], [(None, 0), (SpeculativeConfig(), 0), (None, 2)]))


@pytest.mark.parametrize(
    ("chunk", "blocks", "ahead"),
    [*MACHINERY, (7, ROOMY, (SpeculativeConfig(), 1)), (7, TIGHT, (SpeculativeConfig(), 1))],
    ids=lambda value: None if isinstance(value, tuple) else str(value),
)
def test_a_prompts_log_probabilities_are_transformers(tiny_model, chunk, blocks, ahead):
    """Cold, then again with every prompt in the prefix cache."""
    model = tiny_model("gemma2")
    speculative, depth = ahead
    engine = make_engine(model.decoder(), blocks=blocks, chunk=chunk, speculative=speculative, async_depth=depth)
    for name in ("cold", "warm"):
        requests = mixed(name)
        check_all(model, play(engine, requests), requests)
    preempted = engine.scheduler.stats.num_preemptions
    assert preempted > 0 if blocks == TIGHT else preempted == 0


@pytest.mark.parametrize("name", ["llama-llama3", "qwen2-window", "qwen3", "gemma3"])
def test_each_family_scores_its_prompts(tiny_model, name):
    model = tiny_model(name)
    requests = mixed("")
    check_all(model, play(make_engine(model.decoder(), chunk=7), requests), requests)


def test_what_was_scored_serves_later_prompts(tiny_model):
    decoder = tiny_model("llama").decoder()
    engine = make_engine(decoder)
    prompt = prompts()[3]
    play(engine, [EngineRequest("a", prompt, SamplingParams(max_tokens=0, prompt_logprobs=0))])
    again = play(engine, [EngineRequest("b", prompt, SamplingParams(max_tokens=1))])
    assert again["b"][-1].num_cached_tokens == 16


def test_nan_in_a_prompts_logits_fails_that_request_alone(tiny_model):
    """Its keys turn to NaN between two chunks; it chooses no token, so that only its scores can show it."""
    model = tiny_model("llama")
    engine = make_engine(model.decoder(), chunk=7)
    requests = [
        EngineRequest(name, prompts()[index], SamplingParams(temperature=0, max_tokens=tokens, prompt_logprobs=0))
        for name, index, tokens in (("bad", 3, 0), ("good", 5, 4))
    ]
    for request in requests:
        engine.add_request(request)
    engine.step()
    block = engine.scheduler.cache.block_tables("bad")[0][0]
    for layer in engine.runner.kv:
        layer.k_HSD[:, block * 4 : block * 4 + 4] = float("nan")
    updates = play(engine, [])
    assert [update.finish_reason for update in updates["bad"]] == ["error"]
    assert "not finite" in updates["bad"][0].error
    check_all(model, updates, requests[1:])


class LiveLogits(TorchDispatchMode):
    """Counts the bytes of tensors whose last size is `vocab_size`, as long as their storages live."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[-1] == self.vocab_size:
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage.data_ptr(), storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += nbytes
        self.peak = max(self.peak, self.live)

        def freed() -> None:
            self._seen.discard(key)
            self.live -= nbytes

        weakref.finalize(storage, freed)


@pytest.mark.parametrize("k", [1, -1])
def test_a_long_prompt_stays_within_the_workspace(tiny_model, monkeypatch, k):
    """600 rows of 96 logits where 10 KiB are allowed: 230 KiB at once without slices. Nothing else is 96 wide."""
    monkeypatch.setattr(sizing, "LOGPROB_WORKSPACE", 10 << 10)
    decoder = tiny_model("llama-mqa").decoder()
    prompt = torch.randint(1, VOCAB, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    config = EngineConfig(max_model_len=1024, cache=CacheConfig(4, 200), scheduler=SchedulerConfig(4, 1024))
    engine = Engine(config, decoder.kv_groups, (200,), ModelRunner(decoder, (200,), 4))
    with LiveLogits(VOCAB) as logits:
        updates = play(engine, [EngineRequest("a", prompt, SamplingParams(max_tokens=0, prompt_logprobs=k))])
    assert len(updates["a"][0].prompt_logprobs) == 599
    assert 0 < logits.peak <= sizing.logprob_workspace_bytes(VOCAB, 600) == 10 << 10
