"""Calls of level "fast" that come again: what may go without Dynamo, and what may not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import paceline
from paceline.fusion.direct import learn
from paceline.fusion.optimize import optimised_of


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, twice: bool = False, scale: Any = None) -> dict[str, torch.Tensor]:
        y = self.linear(x)
        if scale is not None:
            y = y * scale[0]
        return {"y": y * 2 if twice else y, "same": y}


def x_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def without_dynamo(model: nn.Module) -> nn.Module:
    """A call that Dynamo would have to see fails from now on."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it went to Dynamo")

    optimised_of(model)._compiled = refuse
    return model


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return paceline.optimize(Affine().eval(), level="fast")


def test_known_shapes_go_without_dynamo(model: nn.Module) -> None:
    shapes = [(1, 5, 32), (3, 5, 32), (4, 7, 32)]
    for shape in (*shapes, *shapes):
        model(x_of(*shape))
    model(x_of(3, 5, 32), twice=True)
    model(x_of(3, 5, 32), twice=True)
    without_dynamo(model)
    with torch.no_grad():
        for shape in shapes:
            x = x_of(*shape) + 1
            y = torch.nn.functional.linear(x, model.linear.weight, model.linear.bias)  # type: ignore[arg-type]
            for twice in (False, True) if shape == (3, 5, 32) else (False,):
                found = model(x, twice=True) if twice else model(x)
                assert list(found) == ["y", "same"]
                torch.testing.assert_close(found["y"], y * (1 + twice))
                torch.testing.assert_close(found["same"], y)
                assert not found["y"].requires_grad


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (x_of(2, 5, 32), {}),  # a shape
        (x_of(3, 32, 5).transpose(1, 2), {}),  # strides
        (x_of(3, 5, 32).double(), {}),
        (x_of(3, 5, 32), {"twice": True}),
        (x_of(3, 5, 32), {"scale": [2.0]}),  # no plain value
    ],
)
def test_what_is_new_goes_to_dynamo(model: nn.Module, x: torch.Tensor, options: dict[str, Any]) -> None:
    for _ in range(2):
        model(x_of(3, 5, 32), twice=False)
    without_dynamo(model)(x_of(3, 5, 32), twice=False)
    with pytest.raises(AssertionError, match="it went to Dynamo"):
        model(x, **{"twice": False, **options})


def test_training_and_gradients_are_the_models_own(model: nn.Module) -> None:
    for _ in range(2):
        model(x_of(3, 5, 32))
    without_dynamo(model)
    assert model(x_of(3, 5, 32).requires_grad_())["y"].requires_grad
    assert model.train()(x_of(3, 5, 32))["y"].requires_grad


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        return y if y.sum() > 0 else y - 1


class Counting(nn.Module):
    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        seen.add_(1)
        return x * 2


def test_control_flow_by_data_is_asked_again() -> None:
    model = paceline.optimize(Branching().eval(), level="fast")
    x = torch.ones(3, 4)
    for sign in (1, 1, 1, -1, 1, -1):
        assert torch.equal(model(sign * x), sign * x * 2 - int(sign < 0))


def test_an_input_that_is_written_to_is_written_to_each_time() -> None:
    model = paceline.optimize(Counting().eval(), level="fast")
    seen = torch.zeros(3)
    for _ in range(4):
        model(torch.ones(3, 4), seen)
    assert seen.tolist() == [4.0] * 3
    assert optimised_of(model)._direct == dict.fromkeys(optimised_of(model)._direct)


def test_nothing_is_learnt_of_more_than_one_graph() -> None:
    class Plain:
        is_plain = True

    x, y = torch.zeros(2), torch.ones(2)
    call: Any = (Plain(), [x], (y,))
    assert learn([call], [x], y) is not None
    assert learn([call, call], [x], y) is None
    assert learn([], [x], y) is None
    assert learn([call], [y], y) is None  # the graph's input came from elsewhere


def bert() -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    torch.manual_seed(0)
    return BertModel(config).eval()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_padding_is_counted_in_each_call(mode: Any) -> None:
    own, model = bert(), paceline.optimize(bert(), level="fast")
    ids, mask = torch.arange(27).view(3, 9), torch.ones(3, 9, dtype=torch.long)
    with mode():
        for _ in range(2):
            model(input_ids=ids, attention_mask=mask)
            model(ids, mask)
            model(attention_mask=mask, input_ids=ids)
        model(ids, mask)
        model(attention_mask=mask, input_ids=ids)
        without_dynamo(model)
        for padded in (0, 2, 8):
            mask = torch.ones(3, 9, dtype=torch.long)
            mask[1, 9 - padded :] = 0
            expected = own(input_ids=ids, attention_mask=mask)
            results = [
                model(input_ids=ids, attention_mask=mask),
                model(ids, mask),
                model(attention_mask=mask, input_ids=ids),
            ]
            for found in results:
                torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5)
                hidden = found.last_hidden_state[mask.bool()]
                torch.testing.assert_close(hidden, expected.last_hidden_state[mask.bool()], rtol=1e-4, atol=1e-5)
                assert not hidden.requires_grad
            results[0].last_hidden_state.zero_()
            assert results[1].last_hidden_state.abs().sum() > 0


def test_an_output_of_transformers_is_one() -> None:
    model = paceline.optimize(bert(), level="fast")
    given = {"input_ids": torch.arange(9)[None], "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    captured = [model(**given) for _ in range(2)][-1]
    found = without_dynamo(model)(**given)
    assert type(found) is type(captured)
    assert list(found) == list(captured) == ["last_hidden_state", "pooler_output"]
    assert vars(found).keys() == vars(captured).keys()
    assert found.hidden_states is None
    assert found[0] is found.last_hidden_state is found["last_hidden_state"] is found.to_tuple()[0]
    torch.testing.assert_close(found.pooler_output, captured.pooler_output)
