"""A mixture of experts: what stacking its weights leaves as it was, and its kernels against its plain twin."""

from __future__ import annotations

import pytest
import torch

from paceline import formats
from paceline.config import MoeConfig
from paceline.formats import int4
from paceline.formats.dense import DenseWeight
from paceline.kernels.experts import experts_shape_refusal
from paceline.layers import moe as module
from paceline.layers.linear import Linear
from paceline.layers.mlp import GatedMLP
from paceline.layers.moe import MoE

pytest.importorskip("triton", reason="the kernels are Triton's")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # so that `make test-gpu` has them
HIDDEN, INNER, EXPERTS = 64, 48, 5


def pack(values_NK: torch.Tensor, kind: str) -> formats.Weight:
    """As on a GPU, also where there is none."""
    values_NK = values_NK.half().to(DEVICE)
    if kind == "dense":
        return DenseWeight(values_NK)
    if kind == "int4":
        q, scale_offset = int4.quantize(values_NK, 32)
        return int4.Int4Weight(int4.pack_words(q, 32), scale_offset, 32, tuple(values_NK.shape), values_NK.dtype)
    return formats.pack(values_NK, kind, dtype=torch.float16, device=DEVICE)


def random_moe(kind: str, *, kinds: tuple[str, ...] = ()) -> MoE:
    torch.manual_seed(0)
    experts = [
        GatedMLP(
            "silu",
            Linear(pack(torch.randn(2 * INNER, HIDDEN) * HIDDEN**-0.5, kind)),
            Linear(pack(torch.randn(HIDDEN, INNER) * INNER**-0.5, (*kinds, *[kind] * EXPERTS)[e])),
        )
        for e in range(EXPERTS)
    ]
    router_ED = torch.randn(EXPERTS, HIDDEN).half().to(DEVICE)
    return MoE(MoeConfig(EXPERTS, 2, INNER, layers=(0,), normalize=True), router_ED, experts)


@pytest.mark.parametrize(("kind", "tokens"), [("dense", 6), ("int8", 1), ("fp8", 6), ("int4", 1)])
def test_the_kernels_answer_as_the_experts_one_by_one(monkeypatch, kind, tokens):
    monkeypatch.setattr(module, "experts_refusal", experts_shape_refusal)
    moe = random_moe(kind)
    x_TD, residual_TD = torch.randn(tokens, HIDDEN).half().to(DEVICE), torch.randn(tokens, HIDDEN).half().to(DEVICE)
    expected_TD = moe.plain(x_TD, residual_TD)
    moe.stack()
    assert moe.stacked is not None
    assert torch.equal(moe.plain(x_TD, residual_TD), expected_TD)  # over the stacked memory
    monkeypatch.setattr(moe, "plain", None)  # the kernels run
    allowed = 1e-2 if kind == "int8" and DEVICE == "cpu" else 2e-3  # torch's int8 op computes in bfloat16
    found_TD = moe(x_TD, residual_TD=residual_TD)
    assert (found_TD - expected_TD).float().norm() < allowed * expected_TD.float().norm()


def test_experts_share_the_stacked_memory():
    moe = random_moe("int8")
    moe.stack()
    stacked = moe.stacked.gate_up.values
    for e, expert in enumerate(moe.experts):
        assert expert.gate_up.weight.q_NK.data_ptr() == stacked[e].data_ptr()


def test_experts_of_several_kinds_stay_as_they_are():
    moe = random_moe("dense", kinds=("int8",))
    moe.stack()
    assert moe.stacked is None
    assert "no kernel reads" in moe.refusal(torch.float16, torch.device("cpu"))


def test_no_expert_in_float32_and_none_without_a_gpu():
    moe = random_moe("dense")
    moe.stack()
    assert moe.refusal(torch.float16, torch.device("cpu")) == "device is cpu"
    choice = moe.choices(torch.float16, torch.device("cpu"))[0]
    assert (choice.operation, choice.reason) == ("experts, 2 of 5 experts", "device is cpu")
