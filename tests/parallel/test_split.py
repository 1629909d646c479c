"""Who holds what, and what cannot be split."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.config import ParallelConfig
from paceline.errors import UsageError
from paceline.models.registry import read_decoder_config
from paceline.parallel.split import (
    Rank,
    kv_heads_of,
    layers_of,
    local_config,
    local_groups,
    share,
    split_refusal,
    vocabulary_of,
)


def ranks(tensor, pipeline=1):
    parallel = ParallelConfig(tensor, pipeline)
    return [Rank(index, parallel) for index in range(parallel.world_size)]


def test_shards_of_a_stage_are_neighbours():
    assert [(r.stage, r.tensor) for r in ranks(2, 2)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [r.leads for r in ranks(2, 2)] == [True, False, True, False]


@pytest.mark.parametrize(("layers", "stages"), [(3, 2), (7, 3), (4, 4), (32, 5)])
def test_every_layer_has_one_stage(layers, stages):
    parts = [layers_of(layers, rank) for rank in ranks(1, stages)]
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("vocabulary", "count"), [(67, 2), (67, 4), (5, 4), (128256, 8)])
def test_every_word_has_one_rank(vocabulary, count):
    parts = [vocabulary_of(vocabulary, rank) for rank in ranks(count)]
    assert [row for part in parts for row in part] == list(range(vocabulary))


@pytest.mark.parametrize(("heads", "expected"), [(4, [[0], [1], [2], [3]]), (2, [[0], [0], [1], [1]]), (1, [[0]] * 4)])
def test_a_rank_has_the_key_heads_of_its_queries(configs, heads, expected):
    config = read_decoder_config(configs["llama"])
    config = replace(config, attention=replace(config.attention, num_heads=8, num_kv_heads=heads))
    found = [list(kv_heads_of(config, rank)) for rank in ranks(4)]
    assert found == expected
    for rank, own in zip(ranks(4), found, strict=True):
        assert {query * heads // 8 for query in share(8, rank)} == set(own)


@pytest.mark.parametrize(
    ("name", "change", "split", "words"),
    [
        ("llama", {}, (3, 1), "3 does not divide the model's 4 attention heads: use 2, or"),
        ("llama", {}, (1, 4), "more than the model's 3 layers"),
        ("llama", {"num_attention_heads": 12, "num_key_value_heads": 3}, (2, 1), "3 key-value heads"),
        ("llama", {"intermediate_size": 82}, (4, 1), "82 inner channels"),
        ("mixtral", {"intermediate_size": 82}, (4, 1), "82 inner channels of an expert"),
    ],
)
def test_what_does_not_divide_is_refused_by_name(configs, name, change, split, words):
    refusal = split_refusal(read_decoder_config({**configs[name], **change}), ParallelConfig(*split))
    assert refusal is not None
    assert words in refusal


def test_a_norm_over_all_heads_is_refused_but_for_stages(configs):
    config = read_decoder_config(configs["llama"])
    config = replace(config, attention=replace(config.attention, qk_norm="projection"))
    assert "use pipeline_parallel_size" in (split_refusal(config, ParallelConfig(2, 1)) or "")
    assert split_refusal(config, ParallelConfig(1, 2)) is None


@pytest.mark.parametrize(("tensor", "pipeline"), [(0, 1), (1, 0), (-2, 1)])
def test_sizes_are_positive(tensor, pipeline):
    with pytest.raises(UsageError, match="parallel_size must be at least 1"):
        ParallelConfig(tensor, pipeline)


def test_a_stage_has_the_whole_models_groups_in_their_order(configs):
    config = read_decoder_config({**configs["gemma2"], "num_hidden_layers": 3})
    for rank in ranks(1, 3):
        groups = local_groups(config, rank)
        assert [(g.name, g.window) for g in groups] == [(g.name, g.window) for g in config.kv_groups]
        assert sorted(layer for g in groups for layer in g.layers) == list(range(len(layers_of(3, rank))))
        own = local_config(config, rank)
        layer = layers_of(3, rank)[0]
        assert own.window(0) == config.window(layer)


def test_experts_of_a_stage_are_those_of_its_layers(configs):
    config = read_decoder_config(configs["qwen3-moe-mixed"])  # experts in the second layer of three
    assert config.moe is not None
    assert config.moe.layers == (1,)
    first, second, third = (local_config(config, rank) for rank in ranks(1, 3))
    assert first.moe is None
    assert third.moe is None
    assert second.moe is not None
    assert second.moe.layers == (0,)
