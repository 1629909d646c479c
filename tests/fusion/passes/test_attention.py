"""Each spelling of attention that the pass claims, and what must keep it from one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

B, H, S, D = 2, 4, 6, 8
LOWEST = torch.finfo(torch.float32).min


def drawn(seed: int) -> tuple[torch.Tensor, ...]:
    """q, k, v, a mask that leaves out two keys of the last row, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, S, D, generator=generator) for _ in range(3))
    out = torch.zeros(B, 1, 1, S, dtype=torch.bool)
    out[-1, ..., -2 - seed :] = True
    return q, k, v, out, torch.randn(1, H, S, S, generator=generator)


CALLS = [drawn(0), drawn(1)]


def additive(out: torch.Tensor) -> torch.Tensor:
    return torch.zeros(out.shape).masked_fill(out, LOWEST)


def slopes() -> torch.Tensor:
    """ALiBi's biases: a slope a head, times the key's place."""
    return torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, H, 1, 1) * torch.arange(S).view(1, 1, 1, S)


def merged(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(B * H, S, D)


def bloom(q: Any, k: Any, v: Any, out: Any, bias: Any) -> torch.Tensor:
    """Heads merged into the batch, ALiBi by baddbmm, the mask where they are apart."""
    scores = torch.baddbmm(slopes().expand(B, H, S, S).reshape(B * H, S, S), merged(q), merged(k).transpose(1, 2))
    scores = scores.view(B, H, S, S).masked_fill(out, LOWEST)
    return torch.bmm(F.softmax(scores, dim=-1).view(B * H, S, S), merged(v))


def expands(q: Any, k: Any, v: Any, out: Any, bias: Any) -> torch.Tensor:
    """As DistilBERT did for years, and T5 by its type_as."""
    scores = q @ k.mT
    scores = scores.masked_fill(out.expand_as(scores), LOWEST)
    return F.softmax(scores.float(), dim=-1).type_as(scores) @ v


def adds_in_place(q: Any, k: Any, v: Any, out: Any, bias: Any) -> torch.Tensor:
    """As T5 did for years."""
    scores = q @ k.mT
    scores.mul_(0.5)
    scores += bias + additive(out)
    return scores.softmax(-1) @ v


SPELLINGS = {
    "plain": lambda q, k, v, out, bias: (q @ k.transpose(-1, -2)).softmax(-1) @ v,
    "scaled": lambda q, k, v, out, bias: torch.softmax(torch.matmul(q, k.mT) * D**-0.5, dim=-1).matmul(v),
    "divided": lambda q, k, v, out, bias: F.softmax(q @ k.transpose(2, 3) / D**0.5, -1) @ v,
    "softmax in float32": lambda q, k, v, out, bias: F.softmax(q @ k.mT, dim=-1, dtype=torch.float32).to(q.dtype) @ v,
    "additive mask": lambda q, k, v, out, bias: ((q @ k.mT) * 0.3 + additive(out)).softmax(-1) @ v,
    "masked_fill": lambda q, k, v, out, bias: (q @ k.mT).masked_fill(out, LOWEST).softmax(-1) @ v,
    "masked_fill with a mask expanded as the scores": expands,
    "masked_fill with a tensor": lambda q, k, v, out, bias: (
        (q @ k.mT).masked_fill(out, torch.tensor(torch.finfo(q.dtype).min)).softmax(-1) @ v
    ),
    "masked_fill with -inf": lambda q, k, v, out, bias: (q @ k.mT).masked_fill(out, float("-inf")).softmax(3) @ v,
    "relative bias and mask": lambda q, k, v, out, bias: (q @ k.mT + bias + additive(out)).softmax(-1) @ v,
    "bias summed before": lambda q, k, v, out, bias: ((bias + additive(out)) + q @ k.mT).softmax(-1) @ v,
    "fill above a bias": lambda q, k, v, out, bias: (q @ k.mT + bias).masked_fill(out, LOWEST).softmax(-1) @ v,
    "alibi": lambda q, k, v, out, bias: (q @ k.mT * D**-0.5 + slopes()).masked_fill(out, LOWEST).softmax(-1) @ v,
    "heads merged, baddbmm": bloom,
    "added in place": adds_in_place,
}


def test_heads_merged_into_the_batch(rewritten: Callable[..., Any]) -> None:
    """The mask is added where they are apart, as BART did for years."""

    def bart(x: torch.Tensor, out: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        x = x * width  # of a size that is the model's and no symbol
        q, k, v = (
            (x + one).view(batch, length, H, D).transpose(1, 2).reshape(batch * H, length, D) for one in (0.1, 0.2, 0.3)
        )
        scores = torch.bmm(q * D**-0.5, k.transpose(1, 2)).view(batch, H, length, length)
        weights = F.softmax((scores + additive(out)).view(batch * H, length, length), dim=-1)
        return torch.bmm(weights, v).view(batch, H, length, D).transpose(1, 2).reshape(batch, length, H * D)

    calls = [(torch.randn(B, S, H * D, generator=torch.Generator().manual_seed(0)), call[3]) for call in CALLS]
    assert rewritten(bart, *calls, width=torch.linspace(-1, 1, H * D)).replaced["attention"] == 1


def returns_weights(q: Any, k: Any, v: Any, out: Any, bias: Any) -> Any:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


def scores_changed(q: Any, k: Any, v: Any, out: Any, bias: Any) -> Any:
    scores = q @ k.mT
    scores[..., 0] = 3
    return scores.softmax(-1) @ v


def weights_changed(q: Any, k: Any, v: Any, out: Any, bias: Any) -> Any:
    weights = (q @ k.mT).softmax(-1)
    weights[..., 0] = 0
    return weights @ v


def bias_changed(q: Any, k: Any, v: Any, out: Any, bias: Any) -> Any:
    weights = (q @ k.mT + bias).softmax(-1)
    bias.add_(1 + bias)
    return weights @ v


LEFT = {
    "over queries": (lambda q, k, v, out, bias: (q @ k.mT).softmax(-2) @ v, "its softmax is not over the keys"),
    "weights are a result": (returns_weights, "used elsewhere"),
    "scores changed in place": (scores_changed, "something other than scales"),
    "bias changed in place": (bias_changed, "changed in place before its end"),
    "capped scores": (
        lambda q, k, v, out, bias: (torch.tanh(q @ k.mT / 5) * 5).softmax(-1) @ v,
        "something other than scales, masks and biases",
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, rewritten: Callable[..., Any]) -> None:
    graph = rewritten(SPELLINGS[name], *CALLS)
    assert graph.replaced["attention"] == 1
    assert graph.error < 1e-5


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left(name: str, rewritten: Callable[..., Any]) -> None:
    function, reason = LEFT[name]
    graph = rewritten(function, *CALLS)
    assert not graph.replaced["attention"]
    assert [reason in told for told in graph.left if told.startswith("attention")] == [True]


def test_weights_changed_in_place_are_none(rewritten: Callable[..., Any]) -> None:
    assert not rewritten(weights_changed, *CALLS).replaced["attention"]


def test_a_row_that_sees_nothing(rewritten: Callable[..., Any]) -> None:
    """Comes out as the model has it: the mean of all values."""
    q, k, v, out, bias = CALLS[0]
    nothing = out.clone()
    nothing[0] = True
    for name in ("masked_fill", "additive mask"):
        assert rewritten(SPELLINGS[name], CALLS[0], (q, k, v, nothing, bias)).replaced["attention"] == 1
