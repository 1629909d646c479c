"""The memory formula against tensors that were really made."""

from __future__ import annotations

import pytest
import torch

from paceline import sizing
from paceline.cache.kv_cache import allocate_kv
from paceline.config import AttentionConfig, DecoderConfig, MlpConfig, MoeConfig, NormConfig, ResidualConfig, RopeConfig
from paceline.formats import Weight, head_format, keeps_memory, matrix_format, pack, resident_bytes, stored_bytes
from paceline.formats.dense import DenseWeight
from paceline.layers.linear import Linear
from paceline.layers.moe import MoE
from paceline.layers.norm import Norm
from paceline.models.decoder import Decoder

CPU = torch.device("cpu")


class RandomParts:
    """Parts that make every tensor a decoder asks for. `format`: a weight format, or "plain" for the values alone."""

    device = CPU

    def __init__(self, format: str, dtype: torch.dtype = torch.float32) -> None:
        self.format = format
        self.dtype = dtype

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        return torch.randn(shape).to(self.dtype)

    def table(self, name: str, rows: int, columns: int) -> torch.Tensor:
        return self.tensor(name, rows, columns)

    def linear(self, name: str, rows: tuple[int, ...], columns: int, *, bias: bool = False) -> Linear:
        values = self.tensor(name, sum(rows), columns)
        packed = self._pack(values, head=name == "head")
        return Linear(packed, self.tensor(name, sum(rows)) if bias else None)

    def tied(self, table_VD: torch.Tensor) -> Linear:
        return Linear(self._pack(table_VD, head=True))

    def _pack(self, values: torch.Tensor, *, head: bool) -> Weight:
        if self.format == "plain":
            return DenseWeight(values)
        format = head_format(self.format) if head else matrix_format(self.format, *values.shape)
        return pack(values, format, dtype=self.dtype, device=self.device)


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


LAYER_NORM = NormConfig(1e-5, "layer", bias=True)
CONFIGS = {
    "plain": make_config(),
    "tied": make_config(tie_embeddings=True),
    "odd sizes": make_config(vocab_size=323, hidden_size=72, mlp=MlpConfig(100)),
    "too small to pack": make_config(vocab_size=12, tie_embeddings=True),
    "biased": make_config(attention=AttentionConfig(4, 4, 16, 0.25, qkv_bias=True, out_bias=True)),
    "mlp bias": make_config(mlp=MlpConfig(96, bias=True)),
    "plain mlp": make_config(mlp=MlpConfig(96, "gelu", bias=True, gated=False), norm=LAYER_NORM),
    "head norms": make_config(
        attention=AttentionConfig(4, 1, 32, 0.25, qk_norm="head"), residual=ResidualConfig(post_norms=True)
    ),
    "projection norms": make_config(
        attention=AttentionConfig(4, 2, 16, 0.25, qk_norm="projection"),
        residual=ResidualConfig(pre_norms=False, post_norms=True),
    ),
    "one norm": make_config(residual=ResidualConfig(parallel=True, shared_norm=True), norm=LAYER_NORM),
    "alibi": make_config(
        attention=AttentionConfig(4, 4, 16, 0.25, alibi=1.0), rope=None, embedding_norm=True, norm=LAYER_NORM
    ),
    "positions": make_config(learned_position_offset=2, rope=None),
    "two ropes": make_config(windows=(None, 8, 8, 8), rope=RopeConfig(1e4, 8), window_rope=RopeConfig(100.0, 16)),
    "experts": make_config(moe=MoeConfig(8, 2, 48, layers=(1, 3))),
    "groups of all sizes": make_config(hidden_size=128, mlp=MlpConfig(300), attention=AttentionConfig(4, 2, 160, 0.25)),
    "experts alone": make_config(moe=MoeConfig(4, 1, 48, layers=(0, 1, 2, 3))),
}


def read_bytes(decoder: Decoder) -> int:
    """Bytes that a step reads if it visits every expert."""
    linears = [module for module in decoder.modules() if isinstance(module, Linear)]
    read = sum(linear.weight.nbytes + (0 if linear.bias_N is None else linear.bias_N.nbytes) for linear in linears)
    for module in decoder.modules():
        if isinstance(module, Norm):
            read += module.weight_C.nbytes + (0 if module.bias_C is None else module.bias_C.nbytes)
        if isinstance(module, MoE):
            read += module.router_ED.nbytes
    return read


def planned(config: DecoderConfig, format: str, dtype: torch.dtype) -> sizing.WeightBytes:
    return sizing.weight_bytes(
        config,
        dtype.itemsize,
        resident_bytes(format, dtype, CPU),
        tied_head_shares=keeps_memory(format, (config.vocab_size, config.hidden_size), dtype, CPU),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("format", ["dense", "int8", "int4", "fp8"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_weight_bytes_are_those_of_the_tensors_to_the_byte(config, format, dtype, held_bytes):
    decoder = Decoder(config, RandomParts(format, dtype))
    assert planned(config, format, dtype).total == held_bytes(decoder)


@pytest.mark.parametrize("format", ["dense", "int8", "int4", "fp8"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_step_reads_what_its_matrices_norms_and_biases_hold(config, format):
    everyone = 10_000  # tokens, so that every expert is visited
    counted = sizing.step_weight_bytes(config, 4, stored_bytes(format, torch.float32), everyone)
    assert counted == read_bytes(Decoder(config, RandomParts(format)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_num_parameters_are_the_values_of_the_tensors(config, held_tensors):
    decoder = Decoder(config, RandomParts("plain"))  # nothing packed, so nothing padded
    counted = sum(tensor.numel() for tensor in held_tensors(decoder))
    assert sizing.num_parameters(config) == counted - sizing.constant_bytes(config) // 4


def test_one_token_reads_its_own_experts_alone():
    config, dense = CONFIGS["experts"], stored_bytes("dense", torch.float32)
    read = [sizing.step_weight_bytes(config, 4, dense, tokens) for tokens in (1, 2, 10_000)]
    expert = 3 * 64 * 48 * 4
    # 2 layers of 8 experts, 2 a token; two tokens visit 8 * (1 - (6/8)**2) = 3.5 of them.
    assert [read[2] - r for r in read] == [2 * 6 * expert, round(2 * 4.5 * expert), 0]


def test_a_shared_tied_head_is_counted_once():
    config = CONFIGS["tied"]
    plain = stored_bytes("dense", torch.bfloat16)
    apart = sizing.weight_bytes(config, 2, plain, tied_head_shares=False).total
    assert apart - sizing.weight_bytes(config, 2, plain, tied_head_shares=True).total == 320 * 64 * 2


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
