from __future__ import annotations

import pytest
import torch

from paceline import formats
from paceline.config import MoeConfig
from paceline.layers.linear import Linear
from paceline.layers.mlp import GatedMLP
from paceline.layers.moe import MoE, route

HIDDEN, INNER, EXPERTS = 64, 32, 5


def config(active: int = 2, normalize: bool = True) -> MoeConfig:
    return MoeConfig(EXPERTS, active, INNER, (0,), normalize)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(moe: MoeConfig, format: str = "dense", dtype: torch.dtype = torch.float32) -> MoE:
    def linear(rows: int, columns: int, seed: int) -> Linear:
        values = random(rows, columns, seed=seed) / columns**0.5
        return Linear(formats.pack(values, format, dtype=dtype, device="cpu"))

    experts = [GatedMLP("silu", linear(2 * INNER, HIDDEN, e), linear(HIDDEN, INNER, 10 + e)) for e in range(EXPERTS)]
    return MoE(moe, random(EXPERTS, HIDDEN, seed=99).to(dtype), experts)


def one_by_one(layer: MoE, x_TD: torch.Tensor) -> torch.Tensor:
    """The definition: each token through each of its experts, alone."""
    rows = []
    for x_D in x_TD:
        probs_E = (layer.router_ED @ x_D).softmax(0)
        weights, experts = probs_E.topk(layer.config.experts_per_token)
        if layer.config.normalize:
            weights = weights / weights.sum()
        rows.append(sum(w * layer.experts[int(e)](x_D[None])[0] for w, e in zip(weights, experts, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("active", [1, 2, EXPERTS])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_a_batch_is_its_tokens_one_by_one(tokens, active, normalize):
    layer, x_TD = make(config(active, normalize)), random(tokens, HIDDEN, seed=3)
    torch.testing.assert_close(layer(x_TD), one_by_one(layer, x_TD), rtol=1e-4, atol=1e-5)


def test_weights_are_probabilities_of_all_experts_or_sum_to_one():
    x_TD, router_ED = random(7, HIDDEN), random(EXPERTS, HIDDEN, seed=1)
    probs_TE = (x_TD @ router_ED.T).softmax(-1)
    experts_TA, weights_TA = route(x_TD, router_ED, config(normalize=False))
    torch.testing.assert_close(weights_TA, probs_TE.gather(1, experts_TA))
    assert (weights_TA[:, 0] >= weights_TA[:, 1]).all()
    _, normalized_TA = route(x_TD, router_ED, config())
    torch.testing.assert_close(normalized_TA, weights_TA / weights_TA.sum(-1, keepdim=True))


def test_experts_that_get_no_token_are_not_asked():
    layer, asked = make(config()), []
    for e, expert in enumerate(layer.experts):
        expert.register_forward_hook(lambda *_, e=e: asked.append(e))
    token_1D = random(1, HIDDEN, seed=4)
    same_TD = token_1D.expand(6, -1)
    chosen = sorted(route(token_1D, layer.router_ED, layer.config)[0][0].tolist())
    layer(same_TD)
    assert asked == chosen
    assert len(chosen) == 2


def test_ties_are_broken_alike_alone_and_in_a_batch():
    """Every token likes experts 1 to 4 equally: two different ones are chosen, at half the weight each."""
    moe = config()
    router_ED = torch.cat((torch.zeros(1, HIDDEN), torch.ones(4, HIDDEN)))
    x_TD = random(40, HIDDEN, seed=5).abs().ceil()  # whole numbers: their sums are exact in any order
    experts_TA, weights_TA = route(x_TD, router_ED, moe)
    assert (weights_TA == 0.5).all()
    assert (experts_TA >= 1).all()
    assert (experts_TA[:, 0] != experts_TA[:, 1]).all()
    for row in (0, 17, 39):
        assert torch.equal(route(x_TD[row : row + 1], router_ED, moe)[0][0], experts_TA[row])


def test_neighbours_change_nothing():
    layer, x_TD = make(config()), random(20, HIDDEN, seed=6)
    whole_TD = layer(x_TD)
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x_TD[shuffled]), whole_TD[shuffled], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x_TD[3:4]), whole_TD[3:4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 12])
def test_int8_experts_multiply_as_their_unpacked_values(tokens):
    layer, plain = make(config(), "int8"), make(config())
    for packed, expert in zip(layer.experts, plain.experts, strict=True):
        for name in ("gate_up", "down"):
            values = getattr(packed, name).weight.unpack().float()
            setattr(expert, name, Linear(formats.pack(values, "dense", dtype=torch.float32, device="cpu")))
    x_TD = random(tokens, HIDDEN, seed=7)
    torch.testing.assert_close(layer(x_TD), plain(x_TD), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("tokens", [1, 33])
def test_bfloat16_loses_what_its_eight_bits_lose(tokens):
    """The router decides from bfloat16 inputs as float32 would from the same values: few near-ties aside, the same."""
    exact, rounded = make(config()), make(config(), dtype=torch.bfloat16)
    exact.router_ED = rounded.router_ED.float()
    x_TD = random(tokens, HIDDEN, seed=8).bfloat16()
    found_TD, expected_TD = rounded(x_TD), exact(x_TD.float())
    assert found_TD.dtype == torch.bfloat16
    error_T = (found_TD.float() - expected_TD).norm(dim=1) / expected_TD.norm(dim=1)
    assert error_T.median() < 0.02
