"""The memory formula against tensors that were really made."""

from __future__ import annotations

import pytest
import torch

from paceline import sizing
from paceline.cache.kv_cache import allocate_kv
from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, NormConfig, ResidualConfig, RopeConfig
from paceline.layers.linear import Linear
from paceline.layers.norm import Norm
from paceline.models.decoder import Decoder


class RandomParts:
    """Parts that make every tensor a decoder asks for, and count what they hold."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, format: str) -> None:
        self.format = format

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        return torch.randn(shape)

    def linear(self, name: str, rows: tuple[int, ...], columns: int, *, bias: bool = False) -> Linear:
        return Linear(self._pack(torch.randn(sum(rows), columns)), torch.randn(sum(rows)) if bias else None)

    def tied(self, table_VD: torch.Tensor) -> Linear:
        return Linear(self._pack(table_VD))

    def _pack(self, values: torch.Tensor):
        from paceline.formats import pack

        return pack(values, self.format, dtype=self.dtype, device=self.device)


def make_config(**changes: object) -> DecoderConfig:
    fields: dict[str, object] = {
        "family": "llama",
        "vocab_size": 320,
        "hidden_size": 64,
        "num_layers": 4,
        "max_position": 256,
        "attention": AttentionConfig(4, 2, 16, 0.25),
        "rope": RopeConfig(1e4, 16),
        "mlp": MlpConfig(96),
        "norm": NormConfig(1e-5),
        **changes,
    }
    return DecoderConfig(**fields)  # type: ignore[arg-type]


CONFIGS = {
    "plain": make_config(),
    "tied": make_config(tie_embeddings=True),
    "biased": make_config(attention=AttentionConfig(4, 4, 16, 0.25, qkv_bias=True, out_bias=True)),
    "mlp bias": make_config(mlp=MlpConfig(96, bias=True)),
    "normed": make_config(
        attention=AttentionConfig(4, 1, 32, 0.25, qk_norm="head"), residual=ResidualConfig(post_norms=True)
    ),
}


def counted_bytes(decoder: Decoder) -> tuple[int, int]:
    """Bytes of everything the decoder holds, and of what one decode step reads of it."""
    linears = [module for module in decoder.modules() if isinstance(module, Linear)]
    read = sum(linear.weight.nbytes + (0 if linear.bias_N is None else linear.bias_N.nbytes) for linear in linears)
    read += sum(module.weight_C.nbytes for module in decoder.modules() if isinstance(module, Norm))
    return read + decoder.embedding.table_VD.nbytes, read


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_weight_bytes_are_those_of_the_tensors(config):
    resident, read = counted_bytes(Decoder(config, RandomParts("dense")))
    assert sizing.weight_bytes(config, 4, bytes_per_linear=4, tied_head_shares=False) == resident
    assert sizing.step_weight_bytes(config, 4, bytes_per_linear=4) == read


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_int8_weight_bytes_leave_out_only_the_scales(config):
    _, read = counted_bytes(Decoder(config, RandomParts("int8")))
    counted = sizing.step_weight_bytes(config, 4, bytes_per_linear=1)
    assert counted < read < 1.06 * counted  # 4 bytes of scale a row of 64 to 128


def test_a_shared_tied_head_is_counted_once():
    config = CONFIGS["tied"]
    apart = sizing.weight_bytes(config, 2, bytes_per_linear=2, tied_head_shares=False)
    assert apart - sizing.weight_bytes(config, 2, bytes_per_linear=2, tied_head_shares=True) == 320 * 64 * 2


WINDOWED = make_config(windows=(None, 8, 8, 8))


@pytest.mark.parametrize("config", [CONFIGS["plain"], WINDOWED], ids=["full", "windowed"])
@pytest.mark.parametrize("budget", [40_000, 100_000, 10**9])
def test_the_cache_is_as_large_as_planned(config, budget):
    plan = sizing.plan_cache(
        config.kv_groups,
        block_size=4,
        bytes_per_value=4,
        budget_bytes=budget,
        max_model_len=64,
        max_num_seqs=4,
        step_tokens=16,
    )
    layers = allocate_kv(config.kv_groups, plan.num_blocks, 4, dtype=torch.float32, device="cpu")
    assert sum(layer.k_HSD.nbytes + layer.v_HSD.nbytes for layer in layers) == plan.nbytes <= budget
    one_block = sum(4 * sizing.kv_bytes_per_token(group, 4) for group in config.kv_groups)
    full = 4 * 64 // 4
    assert plan.num_blocks[0] == full or plan.nbytes + one_block > budget


def test_a_window_group_needs_no_more_than_windows():
    plan = sizing.plan_cache(
        WINDOWED.kv_groups,
        block_size=4,
        bytes_per_value=4,
        budget_bytes=10**9,
        max_model_len=64,
        max_num_seqs=4,
        step_tokens=16,
    )
    assert plan.num_blocks == (64, (4 * (8 + 8) + 16) // 4)


def test_an_impossible_budget_still_plans_a_block_and_says_its_bytes():
    plan = sizing.plan_cache(
        WINDOWED.kv_groups,
        block_size=4,
        bytes_per_value=4,
        budget_bytes=1,
        max_model_len=64,
        max_num_seqs=4,
        step_tokens=16,
    )
    assert plan.num_blocks == (1, 1)
    assert plan.nbytes > 1


def test_the_logprob_workspace_bounds_what_a_slice_takes():
    """Logits of 152,000 tokens: 16 bytes a value to score it, 12 more to return it."""
    for vocab, num_top in ((152_000, 0), (152_000, 20), (152_000, 152_000), (32_000, 10**9)):
        row = vocab * 16 + min(num_top, vocab) * 12
        rows = sizing.logprob_rows(vocab, num_top)
        assert rows * row <= sizing.LOGPROB_WORKSPACE < (rows + 1) * row
    assert sizing.logprob_workspace_bytes(152_000, 2048) == sizing.LOGPROB_WORKSPACE
    assert sizing.logprob_workspace_bytes(100, 4) == 4 * 100 * 28
    assert sizing.logprob_rows(10**8, 0) == 1
    assert sizing.logprob_workspace_bytes(10**8, 2048) == 10**8 * 28
