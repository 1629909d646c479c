"""At level "fast" a call of a kind that was seen goes past Dynamo: with the results of a call that does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import paceline
from paceline.fusion.optimize import optimised_of
from paceline.fusion.shortcut import key_of, learn

transformers = pytest.importorskip("transformers")


def bert() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, int] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 64}
    return transformers.BertModel(transformers.BertConfig(**sizes)).eval()


def text(batch: int, length: int, seed: int = 0, padded: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.long)
    if padded:
        mask[-1, -padded:] = 0
    return {"input_ids": torch.randint(1, 100, (batch, length), generator=draw), "attention_mask": mask}


def without_dynamo(model: nn.Module) -> None:
    """From here on a call that goes through it fails."""

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("through Dynamo")

    optimised_of(model)._compiled = never


def close(found: Any, expected: Any, mask: torch.Tensor) -> None:
    tokens = mask.bool()
    assert type(found) is type(expected)
    assert list(found) == list(expected)
    torch.testing.assert_close(
        found.last_hidden_state[tokens], expected.last_hidden_state[tokens], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_third_call_of_a_kind_does_not_ask_dynamo(mode: Any) -> None:
    own, model = bert(), paceline.optimize(bert(), level="fast")
    with mode():
        for seed in range(2):
            model(**text(3, 9, seed, padded=2))
        without_dynamo(model)
        for seed, padded in ((2, 0), (3, 5), (4, 8)):
            given = text(3, 9, seed, padded)
            found = model(**given)
            close(found, own(**given), given["attention_mask"])
            assert not found.last_hidden_state.requires_grad
        first, second = model(**text(3, 9, 5)), model(**text(3, 9, 5))
        first.last_hidden_state.zero_()
        assert second.last_hidden_state.abs().sum() > 0
        assert first is not second


def test_arguments_by_name_and_by_place_are_two_kinds() -> None:
    own, model = bert(), paceline.optimize(bert(), level="fast")
    given = text(3, 9)
    with torch.no_grad():
        for _ in range(3):
            model(**given)
            model(given["input_ids"], given["attention_mask"])
            model(attention_mask=given["attention_mask"], input_ids=given["input_ids"])
        without_dynamo(model)
        expected = own(**given)
        close(model(given["input_ids"], given["attention_mask"]), expected, given["attention_mask"])
        swapped = model(attention_mask=given["attention_mask"], input_ids=given["input_ids"])
        close(swapped, expected, given["attention_mask"])


def test_what_differs_between_calls_is_noticed() -> None:
    """Other shapes, plain values, dtypes and results."""
    own, model = bert(), paceline.optimize(bert(), level="fast")
    given = text(3, 9)
    types = torch.ones_like(given["input_ids"])
    with torch.no_grad():
        for _ in range(3):
            model(**given)
        for other in (
            text(2, 9),
            text(3, 8),
            {"input_ids": given["input_ids"]},
            {**given, "token_type_ids": types},
            {**given, "attention_mask": given["attention_mask"].int()},
        ):
            for _ in range(3):
                found = model(**other)
            mask = other.get("attention_mask", torch.ones_like(other["input_ids"]))
            close(found, own(**other), mask)
        for _ in range(3):
            states = model(**given, output_hidden_states=True).hidden_states
            pair = model(**given, return_dict=False)
        assert len(states) == 3
        assert isinstance(pair, tuple)
        close(model(**given), own(**given), given["attention_mask"])


def test_training_mode_is_noticed() -> None:
    model = paceline.optimize(bert(), level="fast")
    with torch.no_grad():
        for _ in range(3):
            model(**text(3, 9))
        model.train()
        assert not torch.equal(model(**text(3, 9)).pooler_output, model(**text(3, 9)).pooler_output)  # dropout
        assert "it is in training mode" in str(paceline.fusion.report(model))


def test_a_key_is_for_tensors_and_plain_values() -> None:
    one, other = torch.zeros(2, 3), torch.zeros(2, 3)
    assert key_of(((one,), {"flag": True})) == key_of(((other,), {"flag": True}))
    assert key_of(((one,), {"flag": True})) != key_of(((one,), {"flag": 1}))
    assert key_of(((one,), {})) != key_of(((one.T.contiguous().T,), {}))
    assert key_of(((one, other), {})) != key_of(((one,), {"other": other}))
    assert key_of(((one, one), {})) is None
    assert key_of((([one],), {})) is None
    assert key_of(((nn.Parameter(one),), {})) is None


def test_nothing_is_learnt_of_a_call_that_ran_two_graphs() -> None:
    class Pure:
        pure = True

    x, y = torch.zeros(2), torch.ones(2)
    call: Any = (Pure(), [x], [y])
    assert learn(((x,), {}), [call], y) is not None
    assert learn(((x,), {}), [call, call], y) is None
    assert learn(((x,), {}), [], y) is None
    assert learn(((y,), {}), [call], y) is None  # an input from elsewhere


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)


class InTwoGraphs(Parts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y)


class GivesItsInput(Parts):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, self.first(x)


class WritesToItsInput(Parts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return self.second(self.first(x))


class CountsWhatItGives(Parts):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return self.first(x), x.shape[0]


@pytest.mark.parametrize("kind", [InTwoGraphs, GivesItsInput, WritesToItsInput, CountsWhatItGives])
def test_other_models_go_on_through_dynamo(kind: type[Parts]) -> None:
    torch.manual_seed(0)
    own = kind().eval()
    expected = [torch.randn(3, 8) for _ in range(5)]
    given = [x.clone() for x in expected]
    with torch.no_grad():
        wanted = [own(x) for x in expected]
        model = paceline.optimize(own, level="fast")
        found = [model(x) for x in given]
    for a, b, x, y in zip(wanted, found, expected, given, strict=True):
        for one, two in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (a, b)), strict=True):
            torch.testing.assert_close(one, two) if isinstance(one, torch.Tensor) else (one == two)
        assert torch.equal(x, y)
    assert set(optimised_of(model)._shortcuts.values()) == {None}


def test_level_safe_sees_a_weight_that_changes() -> None:
    model = paceline.optimize(bert())
    with torch.no_grad():
        for _ in range(3):
            before = model(**text(3, 9)).last_hidden_state
        model.embeddings.LayerNorm.weight.mul_(2)
        assert not torch.allclose(model(**text(3, 9)).last_hidden_state, before)
    assert not optimised_of(model)._shortcuts
