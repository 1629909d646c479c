"""The bound on what a step holds, against the tensors that were alive while it ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from paceline import sizing
from paceline.config import (
    AttentionConfig,
    DecoderConfig,
    MlpConfig,
    MoeConfig,
    NormConfig,
    ResidualConfig,
    RopeConfig,
)
from paceline.engine.model_runner import ModelRunner
from paceline.engine.step import NewRequest, ScheduledRequest, SchedulerOutput
from paceline.formats import head_format, matrix_format, pack, unpack_bytes
from paceline.kernels import attention_plan
from paceline.layers.linear import Linear
from paceline.models.decoder import Decoder
from paceline.sampling.params import SamplingParams

BLOCK = 16


@dataclass(frozen=True)
class RandomParts:
    format: str
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).to(self.dtype)

    def table(self, name: str, rows: int, columns: int) -> torch.Tensor:
        return self.tensor(name, rows, columns)

    def linear(self, name: str, rows: tuple[int, ...], columns: int, *, bias: bool = False) -> Linear:
        values = self.tensor(name, sum(rows), columns)
        format = head_format(self.format) if name == "head" else matrix_format(self.format, *values.shape)
        weight = pack(values, format, dtype=self.dtype, device=self.device)
        return Linear(weight, self.tensor(name, sum(rows)) if bias else None)

    def tied(self, table_VD: torch.Tensor) -> Linear:
        return Linear(pack(table_VD, head_format(self.format), dtype=self.dtype, device=self.device))


BASE = DecoderConfig(
    family="llama",
    vocab_size=512,
    hidden_size=128,
    num_layers=2,
    max_position=4096,
    attention=AttentionConfig(8, 2, 16, 0.25),
    rope=RopeConfig(1e4, 16),
    mlp=MlpConfig(352),
    norm=NormConfig(1e-5),
)
CONFIGS = {
    "grouped": BASE,
    "many heads": replace(BASE, attention=AttentionConfig(8, 8, 32, 0.2, qk_norm="head"), rope=RopeConfig(1e4, 8)),
    "wide vocabulary": replace(BASE, vocab_size=16384),
    "soft cap": replace(
        BASE, attention=AttentionConfig(8, 4, 16, 0.25, soft_cap=5.0), residual=ResidualConfig(post_norms=True)
    ),
    "alibi": replace(BASE, attention=AttentionConfig(8, 8, 16, 0.25, alibi=1.0), rope=None),
    "windows": replace(BASE, windows=(None, 64)),
    "plain mlp": replace(BASE, mlp=MlpConfig(512, "gelu", bias=True, gated=False)),
    "experts": replace(BASE, moe=MoeConfig(8, 2, 128, layers=(0, 1))),
}

# num_seqs, tokens already cached, new tokens of each.
STEPS = {
    "one prompt": (1, 0, 512),
    "a later chunk": (1, 512, 512),
    "prompts": (4, 0, 128),
    "decodes": (32, 500, 1),
    "one decode": (1, 1500, 1),
    "drafts": (16, 300, 5),
}
EVERYTHING = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, min_p=0.01, typical_p=0.95, repetition_penalty=1.1)


def held(
    live_bytes: Callable[[], Any], config: DecoderConfig, step: tuple[int, int, int], dtype: torch.dtype, format: str
) -> int:
    """Bytes that a step of requests with scattered blocks held at its widest."""
    torch.manual_seed(0)
    num_seqs, cached, new = step
    blocks = -(-(cached + new) // BLOCK)
    groups = config.kv_groups
    runner = ModelRunner(Decoder(config, RandomParts(format, dtype)), [(num_seqs + 1) * blocks] * len(groups), BLOCK)
    requests, scheduled = [], []
    for r in range(num_seqs):
        # No two blocks of a request are neighbours, so that all must be gathered.
        table = tuple(1 + r + (num_seqs + 1) * i for i in range(blocks))
        prompt = tuple((7 * t + r) % 500 for t in range(cached + new))
        requests.append(NewRequest(str(r), prompt, EVERYTHING, r, frozenset()))
        scheduled.append(ScheduledRequest(str(r), cached, prompt[cached:], 0, True, (table,) * len(groups)))
    with live_bytes() as live:
        step_output = runner.run(SchedulerOutput(tuple(scheduled), tuple(requests)))
    assert len(step_output.token_ids) == num_seqs
    return live.peak


@pytest.fixture
def check(live_bytes: Callable[[], Any]) -> Callable[..., None]:
    def run(config: DecoderConfig, step: tuple[int, int, int], dtype: torch.dtype, format: str = "dense") -> None:
        num_seqs, cached, new = step
        shape = sizing.StepShape(num_seqs * new, num_seqs, cached + new, new, BLOCK)
        bound = sizing.activation_bytes(config, shape, dtype.itemsize, unpacked=unpack_bytes(format, dtype))
        found = held(live_bytes, config, step, dtype, format)
        assert found <= bound <= 2 * found, f"{bound / found:.2f} times what was held"

    return run


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_step_holds_at_most_the_bound_and_at_least_half_of_it(check, config, step):
    check(config, step, torch.float32)


@pytest.mark.parametrize("config", ["grouped", "soft cap", "alibi"])
def test_the_bound_holds_in_16_bits(check, config):
    for step in STEPS.values():
        check(CONFIGS[config], step, torch.bfloat16)


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_the_bound_holds_where_weights_are_unpacked_for_many_rows(check, format):
    wide = replace(BASE, hidden_size=512, mlp=MlpConfig(2048))
    for step in ((1, 0, 160), (32, 100, 5)):  # more rows than int4 takes packed
        check(wide, step, torch.float32, format)
    check(replace(BASE, vocab_size=32768, hidden_size=512), (16, 100, 1), torch.float32, format)


def test_a_batch_of_long_contexts_gathers_no_more_than_its_limit(check, monkeypatch):
    """Without the limit 32 decodes of 500 tokens gather 16,000 keys at once."""
    monkeypatch.setattr(sizing, "BATCHED_KEYS", 2048)
    monkeypatch.setattr(attention_plan, "BATCHED_KEYS", 2048)
    check(CONFIGS["many heads"], STEPS["decodes"], torch.float32)


def test_a_batch_of_many_samples_no_more_at_once_than_its_limit(check, monkeypatch):
    """Without the limit 32 rows of 16,384 logits take 31 MB, with it 12."""
    monkeypatch.setattr(sizing, "SAMPLED_VALUES", 4 * 16384)
    check(CONFIGS["wide vocabulary"], STEPS["decodes"], torch.float32)
