"""`plan` for well-known models against sizes computed by hand: parameters as the model cards and the checkpoints'
indices give them, keys and values by the arithmetic written beside each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import paceline
from paceline.errors import UnsupportedModelError, UsageError
from paceline.planner.inference import Plan

CONFIGS = Path(__file__).parents[1] / "models" / "configs"

# Name -> parameters, and bytes of one token's keys and values in 16 bits:
# 2 (keys and values) * layers * key heads * head dim * 2 bytes.
PUBLISHED = {
    "llama-2-7b-hf": (6_738_415_616, 2 * 32 * 32 * 128 * 2),  # 524,288
    "llama-2-13b-hf": (13_015_864_320, 2 * 40 * 40 * 128 * 2),  # 819,200
    "llama-2-70b-hf": (68_976_648_192, 2 * 80 * 8 * 128 * 2),  # 327,680
    "llama-3.1-8b": (8_030_261_248, 2 * 32 * 8 * 128 * 2),  # 131,072
    "llama-3.1-70b": (70_553_706_496, 2 * 80 * 8 * 128 * 2),  # 327,680
    "llama-3.1-405b": (405_853_388_800, 2 * 126 * 8 * 128 * 2),  # 516,096
    "llama-3.2-1b": (1_235_814_400, 2 * 16 * 8 * 64 * 2),  # 32,768
    "smollm2-135m": (134_515_008, 2 * 30 * 3 * 64 * 2),  # 23,040
    "mistral-7b-v0.1": (7_241_732_096, 2 * 32 * 8 * 128 * 2),  # 131,072
    "mixtral-8x7b-v0.1": (46_702_792_704, 2 * 32 * 8 * 128 * 2),  # 131,072
    "qwen2.5-0.5b": (494_032_768, 2 * 24 * 2 * 64 * 2),  # 12,288
    "qwen2.5-7b": (7_615_616_512, 2 * 28 * 4 * 128 * 2),  # 57,344
    "qwen2.5-72b": (72_706_203_648, 2 * 80 * 8 * 128 * 2),  # 327,680
    "qwen3-8b": (8_190_735_360, 2 * 36 * 8 * 128 * 2),  # 147,456
    "qwen3-30b-a3b": (30_532_122_624, 2 * 48 * 4 * 128 * 2),  # 98,304
    "gemma-2-9b": (9_241_705_984, 2 * 42 * 8 * 256 * 2),  # 344,064, half of it in windows
    "gemma-3-4b-it": (3_880_263_168, 2 * 34 * 4 * 256 * 2),  # 139,264, 29 layers of 34 in windows
    "phi-3-mini-4k-instruct": (3_821_079_552, 2 * 32 * 32 * 96 * 2),  # 393,216
    "falcon-7b": (6_921_720_704, 2 * 32 * 1 * 64 * 2),  # 8,192: one key head
    "pythia-6.9b": (6_857_302_016, 2 * 32 * 32 * 128 * 2),  # 524,288
    "gpt2": (124_439_808, 2 * 12 * 12 * 64 * 2),  # 36,864
    "opt-6.7b": (6_658_473_984, 2 * 32 * 32 * 128 * 2),  # 524,288
    "bloomz-7b1": (7_069_016_064, 2 * 30 * 32 * 128 * 2),  # 491,520
}


def plan(name: str, **options: object) -> Plan:
    return paceline.plan(str(CONFIGS / f"{name}.json"), **{"dtype": "bfloat16", "memory": "2TiB", **options})


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_computed_by_hand(name):
    parameters, kv = PUBLISHED[name]
    found = plan(name)
    assert found.num_parameters == parameters
    # Within 0.01 % of two bytes a parameter: beside them lie some kilobytes of rotary frequencies.
    assert found.weights.total == pytest.approx(2 * parameters, rel=1e-4)
    assert sum(group.bytes_per_token for group in found.cache) == kv


def test_there_are_twenty():
    assert len(PUBLISHED) >= 20


def test_int8_halves_the_matrices_and_keeps_the_embedding():
    """Llama 3.1 8B: a byte for each of 6,979,321,856 values in the layers and 525,336,576 in the head, four for each
    row's scale; two for each of as many values of the embedding and 266,240 of norms; 128 rotary frequencies."""
    layer_values = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    layer_rows = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
    table, norms = 128256 * 4096, 65 * 4096
    w = plan("llama-3.1-8b", quantization="int8").weights
    assert (w.layers, w.head) == (layer_values + 4 * layer_rows, table + 4 * 128256)
    assert (w.embedding, w.small) == (2 * table, 2 * norms + 128 * 4)


def test_a_window_bounds_the_cache_and_what_a_step_reads():
    """Gemma 2 9B at 8,192 tokens: 21 layers keep all of them and 21 their last 4,096."""
    speeds = {(s.batch, s.context): s.nbytes for s in plan("gemma-2-9b", bandwidth=1e12).speeds}
    assert speeds[1, 8192] - speeds[1, 4096] == 21 * (2 * 8 * 256 * 2) * 4096
    assert speeds[1, 4096] - speeds[1, 1024] == 42 * (2 * 8 * 256 * 2) * 3072
    groups = {group.window: group for group in plan("gemma-2-9b", max_num_seqs=1).cache}
    assert groups[None].num_blocks == 8192 // 16
    assert groups[4096].num_blocks == (4096 + 2 * 16 + 2048) // 16


def test_a_token_of_mixtral_reads_two_of_eight_experts():
    """12.9 B active parameters, as its paper says, less the embedding's 131 M."""
    found = {(s.batch, s.context): s for s in plan("mixtral-8x7b-v0.1", bandwidth=1e12).speeds}
    kv = 1024 * 131072
    assert found[1, 1024].nbytes - kv == pytest.approx(2 * (12.88e9 - 131e6), rel=0.001)
    # 64 tokens visit 8 * (1 - (6/8)**64) = 8 experts: everything but the embedding is read.
    assert found[64, 1024].nbytes - 64 * kv == pytest.approx(2 * (46_702_792_704 - 131_072_000), rel=0.001)


def test_the_bound_is_bandwidth_over_bytes():
    found = plan("llama-3.1-8b", bandwidth=3.35e12)
    (speed,) = [s for s in found.speeds if (s.batch, s.context) == (4, 4096)]
    assert speed.nbytes == pytest.approx(2 * (8_030_261_248 - 128256 * 4096) + 4 * 4096 * 131072, rel=1e-9)
    assert speed.tokens_per_second == pytest.approx(4 * 3.35e12 / speed.nbytes)


def test_two_devices_hold_half_of_the_layers_and_the_head_each_and_all_of_the_embedding():
    one, two = (plan("llama-3.1-8b", memory="80GiB", bandwidth=3e12, tensor_parallel_size=n) for n in (1, 2))
    assert (one.num_devices, two.num_devices) == (1, 2)
    assert two.num_parameters == one.num_parameters
    assert two.weights.layers == one.weights.layers // 2
    assert two.weights.head == one.weights.head // 2
    assert two.weights.embedding == one.weights.embedding
    assert two.weights.small == one.weights.small
    assert two.cache[0].bytes_per_token == one.cache[0].bytes_per_token // 2
    assert two.cache[0].num_blocks > one.cache[0].num_blocks
    first = {(s.batch, s.context): s.tokens_per_second for s in one.speeds}
    for speed in two.speeds:  # norms are read by both
        assert 1.99 < speed.tokens_per_second / first[speed.batch, speed.context] < 2
    assert dict(two.largest_batch)[4096] > 2 * dict(one.largest_batch)[4096]


def test_a_model_that_does_not_divide_is_refused():
    with pytest.raises(UsageError, match="3 does not divide the model's 32 attention heads: use 2"):
        plan("llama-3.1-8b", memory="80GiB", tensor_parallel_size=3)


def test_what_fits_is_consistent():
    found = plan("llama-3.1-8b", memory="40GiB")
    limit = 40 * 2**30
    needs = {(fit.batch, fit.context): fit for fit in found.grid}
    for context, most in found.largest_batch:
        for batch in (1, 4, 16, 64, 256):
            assert needs[batch, context].fits == (batch <= most) == (needs[batch, context].nbytes <= limit)
    for batch, longest in found.longest_context:
        for context in found.contexts:
            assert needs[batch, context].fits == (context <= longest)
    assert found.fits
    assert found.total <= limit


def test_too_little_memory_is_said():
    found = plan("llama-3.1-8b", memory="10GiB")
    assert not found.fits
    assert not any(fit.fits for fit in found.grid)
    assert {requests for _, requests in found.largest_batch} == {0}


def test_a_model_without_a_family_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"architectures": ["MambaForCausalLM"], "vocab_size": 8}))
    with pytest.raises(UnsupportedModelError, match="only models that a family of paceline reads") as caught:
        paceline.plan(str(path), memory="1GiB")
    assert "MambaForCausalLM" in str(caught.value)
