"""Models that are no plain functions of their inputs, and calls that are none: optimised where possible, else left as
they are with a reason in the report; the answers are the model's own throughout."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import paceline
from paceline.fusion import report, restore

WIDTH = 32


class Mlp(nn.Module):
    """What the models below are made of; by itself it is as good as any."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.register_buffer("count", torch.zeros(4))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> Any:
        return self.norm(x + self.down(F.gelu(self.up(x))))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def assert_same(found: Any, wanted: Any) -> None:
    (ours, form), (theirs, other) = pytree.tree_flatten(found), pytree.tree_flatten(wanted)
    assert form == other
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def assert_answers(model: nn.Module, *calls: tuple[Any, ...], **options: Any) -> nn.Module:
    """Optimise it, and compare each call's result, and what it does to its arguments and buffers, with a copy's."""
    own = copy.deepcopy(model.eval())
    paceline.optimize(model, **options)
    for args in calls:
        (ours, theirs) = (copy.deepcopy(args) for _ in range(2))
        with torch.no_grad():
            assert_same(model(*ours), own(*theirs))
        assert_same(ours, theirs)
        assert_same(dict(model.named_buffers()), dict(own.named_buffers()))
    return model


class CountsInBuffer(Mlp):
    def forward(self, x: torch.Tensor) -> Any:
        self.count.view(-1)[1:].add_(1)
        return self.up(x) + self.count.sum()


class SetsBuffer(Mlp):
    def forward(self, x: torch.Tensor) -> Any:
        self.count = self.count + 1
        return self.up(x) + self.count.sum()


class CountsInPython(Mlp):
    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        return self.up(x) + self.calls


@pytest.mark.parametrize("level", ["safe", "fast"])
@pytest.mark.parametrize("model", [CountsInBuffer, SetsBuffer, CountsInPython])
def test_state_of_its_own(model: type[Mlp], level: str, x: torch.Tensor) -> None:
    assert_answers(model(), *[(x,)] * 4, level=level)


def test_a_buffer_that_is_set_at_each_call_is_given_up(x: torch.Tensor) -> None:
    model = assert_answers(SetsBuffer(), *[(x,)] * 12)
    assert [graph.refused for graph in report(model).graphs] == ["its weights change from call to call"]


class Branches(Mlp):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.up(x)
        if x.sum() > 0:
            y = self.down(y)
        return self.norm(y)


def test_control_flow_by_data(x: torch.Tensor) -> None:
    model = assert_answers(Branches(), (x.abs(),), (-x.abs(),), (2 * x.abs(),))
    assert report(model).breaks == {"Data-dependent branching": 1}
    assert len(report(model).graphs) == 3


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


class OwnFunction(Mlp):
    def forward(self, x: torch.Tensor) -> Any:
        return self.down(Doubled.apply(self.up(x)))


class ChangesNorm(Mlp):
    def forward(self, x: torch.Tensor) -> Any:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        normed.add_(1)
        return self.norm.weight * normed


class ChangesView(Mlp):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.up(x)
        first = y.mT + 1
        y.add_(1)
        return first, y.mT + 1


class ChangesInput(Mlp):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.up(x)
        x.zero_()
        return y


class ChangesMask(Mlp):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        weights = (self.up(x) @ self.down(x).mT + mask).softmax(-1)
        mask.zero_()
        return weights @ x


class CapsEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, WIDTH, max_norm=1.0)

    def forward(self, ids: torch.Tensor) -> Any:
        return self.embed(ids) + self.embed.weight.sum()


class PartUnderAutocast(Mlp):
    def forward(self, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.up(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.down(y)
        return self.norm(y.float())


class PartWithoutGradients(Mlp):
    def forward(self, x: torch.Tensor) -> Any:
        with torch.no_grad():
            y = self.up(x)
        with torch.no_grad():
            return self.norm(self.down(y))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (OwnFunction, None),
        (ChangesNorm, None),
        (ChangesView, None),
        (ChangesInput, None),
        (PartWithoutGradients, None),
        (PartUnderAutocast, "a part of it runs under autocast"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does it
def test_what_graphs_do_besides(model: type[Mlp], reason: str | None, x: torch.Tensor) -> None:
    """Without a page of warnings, and without a rewrite that had to be dropped."""
    optimised = assert_answers(model(), (x,), (x + 1,))
    assert [graph.refused for graph in report(optimised).graphs] == [reason]


def test_a_mask_that_is_changed(x: torch.Tensor) -> None:
    mask = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(2))
    model = assert_answers(ChangesMask(), (x, mask), (x, 2 * mask))
    (graph,) = report(model).graphs
    assert graph.refused is None
    assert graph.left["attention: something it reads is changed in place before its end"] == 1


def test_weights_that_are_changed() -> None:
    model = assert_answers(CapsEmbedding(), (torch.arange(5),), (torch.arange(9),))
    (graph,) = report(model).graphs
    assert "it changes a weight or buffer of the model" in str(graph.refused)


class Tuples(Mlp):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.up(x)
        heads = y.view(*x.shape[:2], 4, 8).transpose(1, 2)
        joined = torch.cat([torch.tensor([]), heads], -2)
        return y + 1, y + 1, x * 1, self.norm.weight * 2, joined, self.norm.weight, x


def test_results_lie_in_memory_of_their_own(x: torch.Tensor) -> None:
    """Where the model's do: a caller who writes to one changes no other, no input, and no later call."""
    model = assert_answers(Tuples(), (x,))
    (graph,) = report(model).graphs
    assert graph.replaced["repeated"]
    assert graph.replaced["constant"]
    assert graph.replaced["no-op"]
    before = x.clone()
    with torch.no_grad():
        first, second, same, doubled, joined, weight, given = model(x)
        assert joined.is_contiguous()
        for result in (first, same, doubled, joined):
            result.zero_()
        assert second.any()
        assert torch.equal(x, before)
        assert model(x)[3].any()
    assert weight is model.norm.weight
    assert given is x


@dataclass
class Answer:
    first: torch.Tensor
    rest: dict[str, torch.Tensor]


pytree.register_dataclass(Answer)


class Structured(Mlp):
    def forward(self, x: torch.Tensor, parts: list[dict[str, torch.Tensor]], *, scale: float = 1.0) -> Any:
        return Answer(self.up(x) * scale, {"down": self.down(parts[0]["y"]), "same": x})


def test_arguments_and_results_of_any_form(x: torch.Tensor) -> None:
    """Lists and dicts, which cannot be hashed, by place and by name."""
    model = Structured().eval()
    own = copy.deepcopy(model)
    paceline.optimize(model)
    with torch.no_grad():
        for scale in (1.0, 2.0):
            assert_same(model(x, [{"y": -x}], scale=scale), own(x, [{"y": -x}], scale=scale))
        assert_same(model(parts=[{"y": x}], x=-x), own(-x, [{"y": x}]))
    assert list(inspect.signature(model.forward).parameters) == ["x", "parts", "scale"]


@pytest.mark.parametrize("args", [(), (torch.ones(2, WIDTH), 1), ("text",), (torch.ones(2, 7),)])
@pytest.mark.filterwarnings("error")
def test_the_models_own_error(args: tuple[Any, ...], caplog: pytest.LogCaptureFixture) -> None:
    own = Mlp().eval()
    model = paceline.optimize(copy.deepcopy(own))
    with pytest.raises((TypeError, RuntimeError)) as wanted:
        own(*args)
    with caplog.at_level(logging.WARNING), pytest.raises(wanted.type) as found:
        model(*args)
    assert str(found.value) == str(wanted.value)
    assert found.value.__context__ is None
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 1


class Dropped(Mlp):
    def forward(self, x: torch.Tensor) -> Any:
        return F.dropout(self.up(x), 0.5, True)


def test_random_numbers_stay_random(x: torch.Tensor) -> None:
    model = paceline.optimize(Dropped().eval())
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
    assert [graph.refused for graph in report(model).graphs] == ["it draws random numbers (dropout)"]


def test_a_part_in_training_mode(x: torch.Tensor) -> None:
    """Batch norm's statistics are kept once a call."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(5)).eval()
    own = copy.deepcopy(model)
    for one in (paceline.optimize(model), own):
        one[1].train()
        with torch.no_grad():
            one(x)
            one(x)
    assert_same(model.state_dict(), own.state_dict())


def test_shared_weights(x: torch.Tensor) -> None:
    model = Mlp()
    model.down.weight = model.up.weight
    assert_answers(model, (x,))
    with torch.no_grad():
        model.up.weight.mul_(2)
        assert_same(model(x), model.forward.original(x))


def test_quantised_parts(x: torch.Tensor) -> None:
    class Rows(nn.Module):
        """Weights as whole numbers with a scale each."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.scale = linear.weight.detach().abs().amax(1) / 127
            self.register_buffer("rows", (linear.weight.detach() / self.scale[:, None]).round().to(torch.int8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.rows.to(x.dtype) * self.scale[:, None]).t()

    model = Mlp()
    model.up = Rows(model.up)
    assert_answers(model, (x,), (x + 1,))


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torch_jit(part: bool, x: torch.Tensor) -> None:
    model = Mlp().eval()
    with torch.no_grad():
        wanted = model(x)
    if part:
        model.up = torch.jit.script(model.up)
    else:
        model = torch.jit.script(model)
    paceline.optimize(model)
    with torch.no_grad():
        assert_same(model(x), wanted)
        assert_same(model(x), wanted)
    assert report(model).eager == {"a part of it is a torch.jit module, which cannot be looked into": 2}
    restore(model)
    with torch.no_grad():
        assert_same(model(x), wanted)


def test_no_weights_or_weights_on_several_devices(x: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    model = paceline.optimize(Mlp().to("meta").eval())
    for _ in range(3):
        assert model(x.to("meta")).device.type == "meta"
    assert report(model).eager == {"it has weights on the meta device": 3}
    assert len(caplog.records) == 1
    model.to_empty(device="cpu").load_state_dict(Mlp().state_dict())
    with torch.no_grad():
        assert_same(model(x), Mlp()(x))
    assert len(report(model).graphs) == 1


def test_weights_made_in_inference_mode(x: torch.Tensor) -> None:
    """Such tensors count no writes to them."""
    with torch.inference_mode():
        model = paceline.optimize(Mlp().eval())
        model(x)
        model.up.weight.mul_(2)
        assert_same(model(x), model.forward.original(x))
    with torch.inference_mode():
        converted = paceline.optimize(Mlp().eval(), dtype=torch.bfloat16)
        converted(x)
        restore(converted)


def test_a_copy_in_another_dtype_made_in_inference_mode(x: torch.Tensor) -> None:
    model = Mlp().eval()
    paceline.optimize(model, dtype=torch.bfloat16)
    with torch.inference_mode():
        model(x)
    with torch.no_grad():
        model.up.weight.mul_(3)
        torch.testing.assert_close(model(x).float(), model.forward.original(x), rtol=5e-2, atol=5e-2)


def test_a_forward_that_was_set_on_the_instance(x: torch.Tensor) -> None:
    model = Mlp().eval()
    own = model.forward
    mine = vars(model)["forward"] = lambda x: own(x) + 1
    with torch.no_grad():
        wanted = model(x)
        paceline.optimize(model)
        assert_same(model(x), wanted)
        paceline.optimize(model, dtype=torch.bfloat16)
        assert_same(model(x), wanted)
    assert report(model).eager == {
        "its forward was set on the instance, which a copy in another dtype cannot have": 1,
    }
    assert vars(restore(model))["forward"] is mine


def test_hooks_that_come_and_go(x: torch.Tensor) -> None:
    model = paceline.optimize(Mlp().eval())
    with torch.no_grad():
        model(x)
        for register in (model.up.register_forward_hook, model.register_forward_hook):
            hook = register(lambda module, args, result: result * 2)
            assert_same(model(x), restored(model)(x))
            hook.remove()
            assert_same(model(x), restored(model)(x))
        hook = model.down.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        assert_same(model(x), restored(model)(x))


def restored(model: nn.Module) -> nn.Module:
    return restore(copy.deepcopy(model))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_optimised_model(
    copied: Callable[[nn.Module], nn.Module], dtype: torch.dtype | None, x: torch.Tensor
) -> None:
    """It is optimised too, and independent of the first."""
    model = paceline.optimize(Mlp().eval(), dtype=dtype)
    with torch.no_grad():
        wanted = model(x)
        other = copied(model)
        other.up.weight.mul_(3)
        torch.testing.assert_close(other(x).float(), restored(other)(x), rtol=5e-2, atol=5e-2)
        torch.testing.assert_close(model(x), wanted, rtol=2e-2, atol=2e-2)
    assert len(report(other).graphs) == 1
    assert list(other.state_dict()) == list(Mlp().state_dict())


def test_conversions_of_an_optimised_model(x: torch.Tensor) -> None:
    model = paceline.optimize(Mlp().eval())
    with torch.no_grad():
        model(x)
        for dtype in (torch.bfloat16, torch.float64, torch.float32):
            model.to(dtype)
            torch.testing.assert_close(model(x.to(dtype)), restored(model)(x.to(dtype)), rtol=2e-2, atol=2e-2)


def test_in_another_model_and_compiled_by_another(x: torch.Tensor) -> None:
    """Its own forward is captured with the rest."""
    part = paceline.optimize(Mlp().eval())
    whole = nn.Sequential(part, Mlp()).eval()
    with torch.no_grad():
        wanted = restored(whole)(x)
        assert_same(torch.compile(whole, backend="eager")(x), wanted)
        paceline.optimize(whole)
        assert_same(whole(x), wanted)
    assert not report(part).graphs
    assert not report(part).eager
    assert len(report(whole).graphs) == 1
    assert not report(whole).breaks


def test_an_empty_batch(x: torch.Tensor) -> None:
    assert_answers(Mlp(), (x[:0],), (x,), (x[:, :0],))


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_cache_that_grows(
    name: str, tiny_model: Callable[..., nn.Module], tiny_inputs: Callable[..., Any], tensors_of: Callable[..., Any]
) -> None:
    """Token by token, as model.generate calls it."""
    model = tiny_model(name)
    own = copy.deepcopy(model)
    paceline.optimize(model)
    ids = tiny_inputs(name, 2, 6)["input_ids"]
    ours = theirs = None
    with torch.no_grad():
        for tokens in (ids[:, :3], ids[:, 3:4], ids[:, 4:5], ids[:, 5:6]):
            found = model(input_ids=tokens, past_key_values=ours, use_cache=True)
            wanted = own(input_ids=tokens, past_key_values=theirs, use_cache=True)
            ours, theirs = found.past_key_values, wanted.past_key_values
            assert_same(tensors_of(found), tensors_of(wanted))
    assert not report(model).eager


def test_gradient_checkpointing(tiny_model: Callable[..., nn.Module], tiny_inputs: Callable[..., Any]) -> None:
    model = tiny_model("distilbert")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    with torch.no_grad():
        wanted = model(**tiny_inputs("distilbert", 2, 7))[0]
        paceline.optimize(model)
        assert_same(model(**tiny_inputs("distilbert", 2, 7))[0], wanted)
    assert len(report(model).graphs) == 1
