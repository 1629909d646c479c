"""config.json files of well-known checkpoints, as their authors wrote them, and what they say."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from paceline.models.registry import read_decoder_config
from paceline.sizing import num_parameters

CONFIGS = Path(__file__).parent / "configs"

# File -> the parameters of the model, those of its text part where there is another; as transformers counts them.
PARAMETERS = {
    "bloom": 176_247_271_424,
    "bloom-560m": 559_214_592,
    "bloomz-7b1": 7_069_016_064,
    "falcon-11b": 11_102_822_400,
    "falcon-180b": 178_557_088_768,
    "falcon-40b": 41_303_293_952,
    "falcon-7b": 6_921_720_704,
    "falcon-rw-1b": 1_311_625_216,
    "gemma-3-4b-it": 3_880_263_168,
    "gpt-neox-20b": 20_554_567_680,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "granite-3.1-2b-base": 2_533_525_504,
    "llava-1.5-7b-hf": 6_738_939_904,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-base-2407": 12_247_782_400,
    "mistral-small-3.1-24b-base-2503": 23_572_403_200,
    "mixtral-8x7b-v0.1": 46_702_792_704,
    "mpt-30b": 29_957_200_896,
    "mpt-7b": 6_649_286_656,
    "olmo-2-1124-7b": 7_298_617_344,
    "olmo-3-1025-7b": 7_298_011_136,
    "opt-125m": 125_239_296,
    "opt-6.7b": 6_658_473_984,
    "phi-3-mini-4k-instruct": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "pythia-160m": 162_322_944,
    "pythia-6.9b": 6_857_302_016,
    "qwen2-vl-7b-instruct": 7_615_616_512,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-vl-4b-instruct": 4_022_468_096,
    "smollm3-3b": 3_075_098_624,
    "stablelm-2-1_6b": 1_644_515_328,
    "starcoder": 15_517_456_384,
    "starcoder2-3b": 3_030_371_328,
}


def read(name: str):
    return read_decoder_config(json.loads((CONFIGS / f"{name}.json").read_text()))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_published_and_every_key_is_known(name, caplog):
    with caplog.at_level(logging.WARNING):
        assert num_parameters(read(name)) == PARAMETERS[name]
    assert not caplog.records


def test_windows_are_those_of_the_papers():
    assert set(read("mistral-7b-v0.1").windows) == {4096}
    assert read("mistral-7b-v0.3").windows == ()
    assert set(read("phi-3-mini-4k-instruct").windows) == {2047}
    assert read("olmo-3-1025-7b").windows[:4] == (4096, 4096, 4096, None)
    assert read("gemma-3-4b-it").windows[4:7] == (1024, None, 1024)


def test_olmo3_stretches_the_layers_without_a_window_alone():
    config = read("olmo-3-1025-7b")
    assert config.rope is not None
    assert config.rope.scaling is not None
    assert config.rope.scaling.attention_factor == pytest.approx(1.2079, abs=1e-4)
    assert config.window_rope is not None
    assert config.window_rope.scaling is None
    assert config.max_position == 65536 == 8 * config.rope.scaling.original_max_position


def test_smollm3_leaves_every_fourth_layer_unrotated():
    assert read("smollm3-3b").no_rope_layers == tuple(range(3, 36, 4))


def test_granite_multiplies_and_divides():
    config = read("granite-3.1-2b-base")
    assert (config.embedding_scale, config.logit_scale) == (12.0, 0.125)
    assert (config.attention.scale, config.residual.multiplier) == (1 / 64, 0.22)


def test_sixteen_dimensions_of_a_stablelm_head_turn():
    config = read("stablelm-2-1_6b")
    assert config.rope is not None
    assert (config.rope.dim, config.attention.head_dim) == (16, 64)
