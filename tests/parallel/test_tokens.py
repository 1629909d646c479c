"""The tokens of a model that ranks share are those of the whole model, in float32."""

from __future__ import annotations

import pytest
import torch

from paceline.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from paceline.engine.decode_step import DecodeStep
from paceline.engine.engine import Engine, EngineRequest
from paceline.engine.model_runner import ModelRunner
from paceline.layers.norm import Norm
from paceline.loading.random_checkpoint import RandomCheckpoint
from paceline.models.load import load_decoder
from paceline.models.registry import read_decoder_config
from paceline.parallel.parts import RankSplit, join
from paceline.parallel.split import split_refusal
from paceline.sampling.params import SamplingParams

BLOCKS = 24  # few: requests are preempted
SPLITS = {"2": (2, 1), "4": (4, 1), "1x2": (1, 2), "2x2": (2, 2), "1x3": (1, 3)}
# By what a family adds: fewer key heads than ranks, biases, qk-norm, windows and caps, experts, parallel residual,
# ALiBi and a norm after the embedding, learned positions; fused and transposed tensors of the checkpoint.
CASES = [
    ("llama", "2"),
    ("llama", "4"),
    ("llama", "2x2"),
    ("llama-mqa", "2"),
    ("llama-mqa", "4"),
    ("llama-bias", "2"),
    ("qwen3", "2"),
    ("qwen3", "1x2"),
    ("gemma2", "2"),
    ("gemma2", "1x3"),
    ("mixtral", "2"),
    ("mixtral", "4"),
    ("qwen3-moe-mixed", "2x2"),
    ("falcon", "2"),
    ("falcon", "4"),
    ("bloom", "2"),
    ("opt", "2"),
    ("opt", "1x2"),
    ("gpt2", "2"),
    ("phi3", "2"),
]


def requests():
    """Prompts that share a beginning, longer than a chunk; greedy and sampled, with and without penalties."""
    shared = [5, 9, 33, 12, 61, 7, 8, 40, 3, 22]
    params = [
        SamplingParams(temperature=0, max_tokens=14, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=14, ignore_eos=True, repetition_penalty=1.2),
        SamplingParams(temperature=1.0, seed=4, max_tokens=14, ignore_eos=True, n=2),
    ]
    return [EngineRequest(f"request {i}", [*shared[: 10 - i], *range(i, i + 9)], params[i % 3]) for i in range(5)]


def plain_requests():
    """That decode together, greedily, and end one after the other."""
    params = [SamplingParams(temperature=0, max_tokens=8 + 2 * i, ignore_eos=True) for i in range(5)]
    return [EngineRequest(f"plain {i}", [i + 1, 5, 9], params[i]) for i in range(5)]


def answers(model, asked, **options):
    """Every request's tokens, and how often one was preempted, of an engine with little room. `options`: its
    runner's."""
    config = EngineConfig(
        max_model_len=64,
        cache=CacheConfig(block_size=4, num_blocks=BLOCKS),
        scheduler=SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=16, max_chunk=5),
    )
    blocks = (BLOCKS,) * len(model.kv_groups)
    engine = Engine(config, model.kv_groups, blocks, ModelRunner(model, blocks, 4, **options))
    for request in asked:
        engine.add_request(request)
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for update in engine.step():
            assert update.error is None
            tokens.setdefault(update.request_id, []).extend(update.new_token_ids)
    return tokens, engine.scheduler.stats


def whole_model(config):
    checkpoint = RandomCheckpoint(config, dtype=torch.float32, seed=1)
    return load_decoder(checkpoint, read_decoder_config(config), dtype=torch.float32)


@pytest.fixture(scope="module")
def expected(configs):
    found = {}

    def of(name):
        if name not in found:
            found[name] = answers(whole_model(configs[name]), requests())
        return found[name]

    return of


def answers_of_ranks(config, parallel, run_ranks):
    whole = read_decoder_config(config)
    assert split_refusal(whole, parallel) is None

    def work(communicator):
        checkpoint = RandomCheckpoint(config, dtype=torch.float32, seed=1)
        decoder = load_decoder(checkpoint, whole, dtype=torch.float32, split=RankSplit(communicator))
        return answers(join(decoder, whole, communicator), requests())

    return run_ranks(parallel, work)


@pytest.mark.parametrize(("name", "split"), CASES)
def test_the_ranks_choose_the_tokens_of_the_whole_model(configs, run_ranks, expected, name, split):
    tokens, stats = expected(name)
    assert stats.num_preemptions > 0
    assert stats.cache.prefix_hit_tokens > 0
    for found, _ in answers_of_ranks(configs[name], ParallelConfig(*SPLITS[split]), run_ranks):
        assert found == tokens


@pytest.mark.parametrize(("split", "left"), [("1x2", True), ("2", False)])
def test_a_sum_is_left_to_a_norm_of_the_same_rank(monkeypatch, configs, run_ranks, expected, split, left):
    """As on a GPU, here by torch. A stage hands on what is added up; a part of a projection has the residual inside."""
    tokens, _ = expected("llama")
    sums, of_sum = [], Norm.of_sum
    monkeypatch.setattr("paceline.models.decoder.in_place_refusal", lambda x_TC: None)
    monkeypatch.setattr(Norm, "of_sum", lambda self, x: sums.append(x) or of_sum(self, x))
    for found, _ in answers_of_ranks(configs["llama"], ParallelConfig(*SPLITS[split]), run_ranks):
        assert found == tokens
    assert bool(sums) == left


def test_where_one_rank_has_no_memory_for_a_decode_all_take_smaller_ones(configs, run_ranks):
    config, parallel = configs["llama"], ParallelConfig(2)
    whole = read_decoder_config(config)

    def work(communicator):
        asked, made = [], []

        def decode(kv):
            made.append(DecodeStep(model, kv, 4, max_rows=6, max_model_len=64))
            return made[0]

        def all_have_room(rows):
            asked.append(rows)
            fits = rows < 5 or communicator.rank.index == 0
            return bool(communicator.agree([fits], torch.device("cpu"))[0])

        checkpoint = RandomCheckpoint(config, dtype=torch.float32, seed=1)
        decoder = load_decoder(checkpoint, whole, dtype=torch.float32, split=RankSplit(communicator))
        model = join(decoder, whole, communicator)
        tokens, _ = answers(model, plain_requests(), decode=decode, all_have_room=all_have_room)
        return tokens, asked, made[0].max_rows

    tokens, _ = answers(whole_model(config), plain_requests())
    first, second = run_ranks(parallel, work)
    assert first == second
    assert first[0] == tokens
    assert first[1] == [5, 4, 3, 2, 1]  # each size is asked for once
    assert first[2] == 4
