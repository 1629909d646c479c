"""What no pass replaces goes to torch.compile in parts. Which nodes are a part is asked without a compiler; with one,
which takes seconds, whether the parts work where they stand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import paceline
from paceline.fusion import measure_stages, report
from paceline.fusion.cuda_graphs import GraphPool
from paceline.fusion.graph import fake, name_of
from paceline.fusion.optimize import optimised_of
from paceline.fusion.passes import compile_rest
from paceline.fusion.passes.compile_rest import NODES, PARTS

WIDTH = 32


class Holder(nn.Module):
    """A function of its inputs and two linears, which are packed: not torch's own any more."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.function = function
        self.eval()

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def x_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(sum(shape)))


def compiles() -> int:
    """How many graphs Dynamo has handed to a compiler: ours or torch's."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are made, and run node by node."""
    monkeypatch.setattr(compile_rest, "compiled", lambda function: function)


def check(function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    """The report of the one graph of a Holder, whose results and inputs behind two calls are as its own forward's."""
    model = Holder(function)
    expected_inputs, found_inputs = copy.deepcopy(inputs), copy.deepcopy(inputs)
    with torch.no_grad():
        expected = [model(*expected_inputs) for _ in range(2)]
        paceline.optimize(model, compile_rest=True)
        found = [model(*found_inputs) for _ in range(2)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_inputs, expected_inputs, rtol=1e-5, atol=1e-5)
    (graph,) = report(model).graphs
    assert graph.refused is None
    assert not any("eager" in reason for reason in graph.left)
    return graph


def rewritten(function: Callable[..., Any], *inputs: torch.Tensor) -> list[torch.fx.Node]:
    """What runs in the place of a Holder."""
    model = paceline.optimize(Holder(function), compile_rest=True)
    model(*inputs)
    ((captured, _),) = optimised_of(model).record(inputs, {})
    return list(captured._run.__self__.graph.nodes)  # type: ignore[union-attr]


def around_a_linear(model: Holder, x: torch.Tensor) -> torch.Tensor:
    """What goes into the linear and what comes out of it meet: as one part the whole would need itself."""
    a = (x * 2).tanh()
    return (a + model.first(a)).exp() * a


def gate(model: Holder, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A linear stands between the two that can be one."""
    return F.silu(model.first(x)) * model.second(y)


def heads(model: Holder, x: torch.Tensor) -> Any:
    """Views of one product, of which one is a result as well."""
    q, k = model.first(x).view(*x.shape[:2], 4, 8).transpose(1, 2).chunk(2, -1)
    return (q * 2).tanh().mT + k.mT, k


def halves(model: Holder, x: torch.Tensor) -> Any:
    """Two linears that are joined: each has a half of one product."""
    q, k = model.first(x), model.second(x)
    return (q * 2).tanh() + k, k


def alone(model: Holder, x: torch.Tensor) -> torch.Tensor:
    return model.second(model.first(x).view(-1, WIDTH).tanh())


def products(model: Holder, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.mT @ y).relu()


def layers(model: Holder, x: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        x = model.norm(x + (model.first(x) * 3).tanh())
    return x


def writes(model: Holder, x: torch.Tensor, cache: torch.Tensor) -> Any:
    before = cache[:, 1:] * 2
    cache.add_((model.first((x * 2).tanh()) * 3).exp())
    after = cache * 2
    cache[:, 0] = model.second(x)[:, 0]
    return ((before.mean() + after) * 3).exp(), cache.sum()


@pytest.mark.parametrize(
    ("function", "inputs", "parts", "nodes"),
    [
        (around_a_linear, (x_of(2, 5),), 2, 5),
        (gate, (x_of(2, 5), x_of(2, 5)), 1, 2),
        (heads, (x_of(2, 5),), 1, 3),
        (alone, (x_of(2, 5),), 0, 0),
        (products, (x_of(2, 5), x_of(2, 5)), 0, 0),
        (layers, (x_of(2, 5),), 3, 12),
        (writes, (x_of(2, 5), x_of(2, 5)), 3, 8),
    ],
)
def test_what_is_a_part(
    uncompiled: None, function: Callable[..., Any], inputs: Sequence[torch.Tensor], parts: int, nodes: int
) -> None:
    graph = check(function, *inputs)
    assert (graph.replaced[PARTS], graph.replaced[NODES]) == (parts, nodes)


def test_parts_that_are_alike_are_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(compile_rest, "compiled", lambda function: made.append(function) or function)
    assert check(layers, x_of(2, 5)).replaced[PARTS] == 3
    assert len(made) == 1


@pytest.mark.parametrize(("function", "width"), [(heads, WIDTH), (halves, 2 * WIDTH)])
def test_a_part_takes_and_gives_what_was_computed_and_no_view_of_it(
    uncompiled: None, function: Callable[..., Any], width: int
) -> None:
    nodes = rewritten(function, x_of(2, 5))
    (part,) = [node for node in nodes if node.op == "call_module"]
    tensors = [node for node in part.all_input_nodes if isinstance(fake(node), torch.Tensor)]
    assert [tuple(fake(node).shape)[2:] for node in tensors] == [(width,)]  # the linear's, before it was cut
    assert len(fake(part)) == 1


def test_what_is_needed_late_is_computed_late(uncompiled: None) -> None:
    """A decoder's keys and values of every layer come from the encoder, and should not all lie in memory at once."""

    def late(model: Holder, x: torch.Tensor, *all_encoded: torch.Tensor) -> torch.Tensor:
        for linear, encoded in zip((model.first, model.second), all_encoded, strict=True):
            seen = F.scaled_dot_product_attention(x, linear(encoded), encoded)
            x = model.norm(x + linear(seen))
        return x

    nodes = rewritten(late, x_of(2, 5), x_of(2, 7), x_of(2, 7) + 1)
    of_linears = [place for place, node in enumerate(nodes) if node.name.startswith("_linear")]
    (attention,) = [place for place, node in enumerate(nodes) if name_of(node) == "sdpa"]  # the other is in a part
    assert len(of_linears) == 4
    assert of_linears[0] < attention < of_linears[1]


def test_it_is_a_stage_of_its_own(uncompiled: None) -> None:
    model = paceline.optimize(Holder(around_a_linear), compile_rest=True)
    stages = {stage.name: stage for stage in measure_stages(model, x_of(2, 5), repeats=1)}
    assert stages["compile rest"].error == 0
    plain = paceline.optimize(Holder(around_a_linear))
    assert "compile rest" not in [stage.name for stage in measure_stages(plain, x_of(2, 5), repeats=1)]


def test_a_compiler_that_fails_leaves_parts_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[int] = []

    def broken(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: torch.Tensor, *others: Any) -> Any:
            tried.append(len(x))
            if len(x) > 2:
                raise RuntimeError("no compiler\nand a page of it")
            return function(x, *others)

        return run

    monkeypatch.setattr(compile_rest, "compiled", broken)
    model = paceline.optimize(Holder(around_a_linear), compile_rest=True)
    for batch in (2, 3, 3, 2):
        x = x_of(batch, 5)
        torch.testing.assert_close(model(x), optimised_of(model).original(x))
    assert tried == [2, 2, 3, 3]  # both parts when they are compared, then once more, and never again
    (graph,) = report(model).graphs
    assert graph.left == {"a part stays eager: torch.compile failed with RuntimeError: no compiler": 2}
    assert [record.message for record in caplog.records if "no compiler" in record.message] == list(graph.left)


def test_an_error_of_the_inputs_is_not_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + y,)

    monkeypatch.setattr(compile_rest, "compiled", lambda function: function)
    told = compile_rest.GraphReport(0)
    part = compile_rest.Part(add, [(2,), (2,)], told)
    with pytest.raises(RuntimeError, match="size of tensor"):
        part(torch.ones(2), torch.ones(3))
    assert not told.left
    assert part(torch.ones(2), torch.ones(2))[0].tolist() == [2, 2]


def test_other_results_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_rest, "compiled", lambda function: lambda *x: tuple(one + 1 for one in function(*x)))
    model = paceline.optimize(Holder(around_a_linear), compile_rest=True)
    x = x_of(2, 5)
    for _ in range(2):
        torch.testing.assert_close(model(x), optimised_of(model).original(x))
    (graph,) = report(model).graphs
    assert graph.refused is None
    assert graph.replaced == {"packed linear": 1}
    (reason,) = graph.left
    assert reason.startswith("the rest stays eager: torch.compile's results differ by ")


def test_results_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a compiler sees that two are equal."""

    def twice(model: Holder, x: torch.Tensor) -> Any:
        positive = (x * 2).relu()
        return positive, positive.relu()

    monkeypatch.setattr(compile_rest, "compiled", lambda function: lambda *x: (function(*x)[0],) * 2)
    model = paceline.optimize(Holder(twice), compile_rest=True)
    for _ in range(2):
        first, second = model(x_of(2, 5))
        assert first.data_ptr() != second.data_ptr()
    assert report(model).replaced[PARTS] == 1


def rotated(model: Holder, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """A layer written by hand, of rotary embeddings, attention and a gate."""
    batch, length, width = x.shape
    angles = torch.arange(length, device=x.device)[:, None] * 0.1 ** torch.arange(4, device=x.device)
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    q, k = model.first(x).view(batch, length, 4, 8).transpose(1, 2), x.view(batch, length, 4, 8).transpose(1, 2)
    q, k = (one * cos + torch.cat([-one[..., 4:], one[..., :4]], -1) * sin for one in (q, k))
    scores = q @ k.mT / 8**0.5
    scores = scores.masked_fill(attention_mask[:, None, None, :] == 0, torch.finfo(x.dtype).min)
    seen = (scores.softmax(-1) @ k).transpose(1, 2).reshape(batch, length, width)
    return model.norm(x + F.silu(seen) * model.second(seen))


def given(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - length // 3 :] = 0
    return x_of(batch, length), mask


def agrees(model: nn.Module, batch: int, length: int) -> None:
    inputs = given(batch, length)
    with torch.no_grad():
        wanted = optimised_of(model).original(*inputs)
    torch.testing.assert_close(model(*inputs), wanted, rtol=1e-5, atol=1e-5)


def test_compiled_once_for_all_sizes_and_for_copies_anew() -> None:
    model = paceline.optimize(Holder(rotated), compile_rest=True)
    agrees(model, 4, 4)  # sizes that are equal by chance
    (graph,) = report(model).graphs
    assert graph.replaced[PARTS] == 3
    assert not any("eager" in reason for reason in graph.left)
    before = compiles()
    for shape in [(4, 4), (2, 9), (8, 3), (3, 2)]:
        agrees(model, *shape)
    assert compiles() == before
    agrees(model, 1, 5)  # a graph of its own
    before = compiles()
    agrees(model, 1, 9)
    assert compiles() == before
    with torch.no_grad():
        model.norm.weight.mul_(2)
        model.first.weight.mul_(-1)
    agrees(model, 2, 9)
    model.norm.weight.data = model.norm.weight.data * 3
    agrees(model, 2, 9)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in twins:
        assert not report(twin).graphs
        agrees(twin, 2, 9)
        assert report(twin).graphs[0].replaced == graph.replaced
    paceline.fusion.restore(model)
    assert "forward" not in vars(model)


def test_nothing_is_compiled_while_a_cuda_graph_is_captured() -> None:
    class Recorder:
        """Captures by calling."""

        def __init__(self) -> None:
            self.compiled: list[int] = []

        def capturing(self) -> bool:
            return False

        def follow(self) -> None:
            pass

        def record(self, call: Callable[[], Any]) -> Any:
            before = compiles()
            self.outputs = call()
            self.compiled.append(compiles() - before)
            return self

        def held_bytes(self) -> int:
            return 0

        def release(self) -> None:
            pass

    model = paceline.optimize(Holder(rotated), compile_rest=True)
    inputs = given(2, 9)
    model(*inputs)
    ((captured, _),) = optimised_of(model).record(inputs, {})
    recorder = Recorder()
    pool = GraphPool(captured._run, recorder)
    for shape in ((2, 9), (3, 4), (5, 5)):
        ((_, graph_inputs),) = optimised_of(model).record(given(*shape), {})
        for mode in (torch.no_grad(), torch.inference_mode()):  # between which torch compiles again
            with mode:
                pool(*graph_inputs)
    assert pool.counts.captured == 3
    assert recorder.compiled == [0, 0, 0]


@pytest.mark.gpu
def test_parts_in_cuda_graphs() -> None:
    model = paceline.optimize(Holder(rotated).cuda(), compile_rest=True)
    shapes = [(2, 9), (3, 4), (5, 5)]
    for shape in shapes:
        inputs = [value.cuda() for value in given(*shape)]
        with torch.no_grad():
            wanted = optimised_of(model).original(*inputs)
        for _ in range(4):  # compared, seen, captured, replayed
            torch.testing.assert_close(model(*inputs), wanted, rtol=1e-4, atol=1e-4)
    (graph,) = report(model).graphs
    assert graph.replaced[PARTS] >= 2
    assert not any("eager" in reason for reason in graph.left)
    assert graph.cuda_graphs is not None
    assert graph.cuda_graphs.captured == len(shapes)
    assert graph.cuda_graphs.replayed >= len(shapes)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_models_of_transformers(
    name: str,
    tiny_model: Callable[..., nn.Module],
    tiny_inputs: Callable[..., dict[str, torch.Tensor]],
    assert_as_exact: Callable[[Any, Any, Any], None],
) -> None:
    model, own, exact = tiny_model(name), tiny_model(name), tiny_model(name, dtype=torch.float64)
    paceline.optimize(model, level="fast", compile_rest=True)
    counts = []
    for shape in [(2, 7), (2, 7), (3, 5), (4, 4)]:
        inputs = tiny_inputs(name, *shape)
        with torch.no_grad():
            results = [each(**inputs, use_cache=False) for each in (model, own, exact)]
        real = inputs["attention_mask"].bool()
        assert_as_exact(*(result.logits[real] for result in results))
        counts.append(compiles())
    assert counts == counts[:1] * 4
    (graph,) = report(model).graphs
    assert graph.replaced[PARTS] >= 3
    assert graph.replaced["padding left out"] == 1
    assert not any("eager" in reason for reason in graph.left)
