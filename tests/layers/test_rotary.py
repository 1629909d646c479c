from __future__ import annotations

import math

import pytest
import torch

from paceline.config import RopeConfig, RopeScaling
from paceline.kernels.rotary import apply_rotary
from paceline.layers.rotary import Rotary, inverse_frequencies
from paceline.models.hf_config import HFConfig
from paceline.models.hf_rope import read_rope

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CPU = torch.device("cpu")


def test_frequencies_are_the_papers():
    expected = [10_000.0 ** (-2 * i / 64) for i in range(32)]
    assert torch.allclose(inverse_frequencies(RopeConfig(10_000.0, 64)), torch.tensor(expected), rtol=1e-6, atol=0)


SHORT, LONG = [1.0 + i / 8 for i in range(16)], [1.0 + i for i in range(16)]
LONGROPE = {"original_max_position_embeddings": 1024, "short_factor": SHORT, "long_factor": LONG}
SCALED = {
    "llama3": LLAMA3,
    "linear": {"rope_type": "linear", "factor": 8.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn-lengths": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
    },
    "yarn-exact": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 512,
        "truncate": False,
        "attention_factor": 1.3,
    },
    "longrope": {"rope_type": "longrope", "partial_rotary_factor": 0.25, **LONGROPE},
    "longrope-factor": {"rope_type": "longrope", "partial_rotary_factor": 0.25, "factor": 32.0, **LONGROPE},
}


@pytest.mark.parametrize("context", [1, 1024, 1025, 4096, 4097, 50_000])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("name", SCALED)
def test_scaled_frequencies_and_lengths_are_those_of_transformers(name, theta, context):
    """Of heads of 128 in a model of 4,096 positions, at contexts on either side of both trained lengths."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {**SCALED[name], "rope_theta": theta}
    config = LlamaConfig(head_dim=128, max_position_embeddings=4096, rope_parameters=dict(parameters))
    hf = HFConfig({"max_position_embeddings": 4096, "rope_parameters": parameters})
    rope = read_rope(hf, 128, partial_key="partial_rotary_factor").with_context(context)
    expected_F, length = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, CPU, seq_len=context)
    assert torch.allclose(inverse_frequencies(rope), expected_F, rtol=3e-7, atol=0)
    assert rope.scaling is not None
    assert rope.scaling.attention_factor == pytest.approx(length, rel=1e-12)


def test_llama3_keeps_the_fast_divides_the_slow_and_blends_between():
    plain = inverse_frequencies(RopeConfig(5e5, 128))
    scaled = inverse_frequencies(RopeConfig(5e5, 128, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)))
    turns = 8192 * plain / (2 * math.pi)
    ratio = scaled / plain
    assert torch.equal(ratio[turns > 4], torch.ones_like(ratio[turns > 4]))
    assert torch.allclose(ratio[turns < 1], torch.full_like(ratio[turns < 1], 1 / 8))
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) >= 2
    assert ((between > 1 / 8) & (between < 1)).all()


@pytest.mark.parametrize("position", [0, 1, 4097, 131_071])
def test_rotary_turns_each_plane_by_its_angle(position):
    rope = RopeConfig(1e4, 8)
    x = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0))
    found = apply_rotary(x, *Rotary(rope, torch.float32, CPU)(torch.tensor([position])))
    angles = position * inverse_frequencies(rope)  # in float32, as the models were trained
    planes = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(4), angles)
    assert torch.allclose(found, torch.cat((planes.real, planes.imag), dim=-1), atol=1e-5)


def test_rotary_gives_cosines_and_sines_in_the_models_dtype():
    cos, sin = Rotary(RopeConfig(1e4, 8), torch.bfloat16, CPU)(torch.arange(3))
    assert cos.dtype == sin.dtype == torch.bfloat16
    assert cos.shape == sin.shape == (3, 8)
