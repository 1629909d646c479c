"""Each name of torch that fusion/dynamo.py uses and that torch does not promise to keep is there, and means what it is
used for. A torch that fails one of these needs that file mended, and nothing else."""

from __future__ import annotations

import ast
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

from paceline.fusion import dynamo

FUSION = Path(dynamo.__file__).parent
ALLOWED = {"_pytree"}  # which has kept its names since torch 1.8, and which torch.fx and others import so


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = 2.0

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return self.linear(x) * self.scale if y is None else self.linear(x) + y


@pytest.fixture
def captured() -> list[torch.fx.GraphModule]:
    return []


@pytest.fixture
def backend(captured: list[torch.fx.GraphModule]) -> dynamo.Backend:
    def keep(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        keep.inputs = inputs
        captured.append(graph_module)
        return graph_module.forward

    return keep


def test_private_names_stand_in_one_file() -> None:
    found = set()
    for path in FUSION.rglob("*.py"):
        if path.name == "dynamo.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
                parts = ast.unparse(node).split(".")
            else:
                continue
            found |= {part for part in parts if part.startswith("_") and not part.startswith("__")}
    assert found <= ALLOWED


@pytest.mark.parametrize("watch", [True, False])
def test_modules_are_watched_or_not(watch: bool, captured: list[Any], backend: dynamo.Backend) -> None:
    model = Counted()
    run = dynamo.compile_with(model.forward, backend, watch_modules=watch)
    x = torch.ones(2, 4)
    with torch.no_grad():
        first = run(x)
        model.scale = 3.0
        again = run(x)
    assert len(captured) == (2 if watch else 1)
    assert torch.equal(first, again) is not watch


def test_weights_are_given_as_themselves(captured: list[Any], backend: Any) -> None:
    """CapturedGraph knows them by identity."""
    model = Counted()
    with torch.no_grad():
        dynamo.compile_with(model.forward, backend, watch_modules=True)(torch.ones(2, 4))
    assert any(value is model.linear.weight for value in backend.inputs)


def test_any_number_of_models_and_of_captures(captured: list[Any], backend: dynamo.Backend) -> None:
    """Each model has a limit of its own, above torch's 8."""

    def named(x: torch.Tensor, name: str) -> torch.Tensor:
        return x + len(name)

    for _ in range(2):
        run = dynamo.compile_with(named, backend, watch_modules=True)
        for length in range(12):
            run(torch.ones(3), "n" * length)
    assert len(captured) == 2 * 12


def test_one_graph_for_all_sizes(captured: list[Any], backend: dynamo.Backend) -> None:
    run = dynamo.compile_with(lambda x: x * 2, backend, watch_modules=True)
    for shape in [(2, 3), (5, 4), (7, 9)]:
        x = torch.ones(shape)
        dynamo.mark_dynamic(x)
        run(x)
    assert len(captured) == 1


def test_sizes_that_are_fixed_and_those_that_are_not(captured: list[Any], backend: dynamo.Backend) -> None:
    run = dynamo.compile_with(lambda x: x * 2, backend, watch_modules=True)
    marked = torch.ones(3, 3)
    dynamo.mark_sizes(marked, ("a symbol", 3))
    for given in (marked, torch.ones(5, 3), torch.ones(3, 3)):
        run(given)
    assert len(captured) == 1
    run(torch.ones(5, 4))
    assert len(captured) == 2


def test_a_function_is_compiled_as_a_whole() -> None:
    run = dynamo.compiled(lambda x: (x * 2).tanh() + 1)
    torch.testing.assert_close(run(torch.ones(3)), (torch.ones(3) * 2).tanh() + 1)
    with pytest.raises(dynamo.CaptureError, match="print"):
        dynamo.compiled(lambda x: print(x) or x)(torch.ones(3))


def test_graph_breaks_are_counted(backend: dynamo.Backend) -> None:
    def branches(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1

    before = dynamo.graph_breaks()
    dynamo.compile_with(branches, backend, watch_modules=True)(torch.ones(3))
    found = {reason: count - before.get(reason, 0) for reason, count in dynamo.graph_breaks().items()}
    assert sum(found.values()) == 1
    assert all("\n" not in reason for reason in found)


def test_what_cannot_be_captured_raises_one_error(backend: dynamo.Backend, caplog: pytest.LogCaptureFixture) -> None:
    run = dynamo.compile_with(Counted().forward, backend, watch_modules=True)
    with caplog.at_level(logging.WARNING), dynamo.quiet(), pytest.raises(dynamo.CaptureError):
        run(torch.ones(2, 7))
    assert not caplog.records


def test_names_of_parameters(captured: list[Any], backend: dynamo.Backend) -> None:
    x = torch.ones(2, 4)
    with torch.no_grad():
        dynamo.compile_with(Counted().forward, backend, watch_modules=True)(x, y=x + 1)
    names = [str(node.target) for node in captured[0].graph.nodes if node.op == "placeholder"]
    found = [dynamo.parameter_of(name, ["x", "y"]) for name in names]
    assert sorted(name for name in found if name is not None) == ["x", "y"]


def test_memory_of_fake_tensors(captured: list[Any], backend: dynamo.Backend) -> None:
    """Views, however spelled, lie in their base's memory; what is computed lies elsewhere."""

    def views(x: torch.Tensor) -> Any:
        return x.mT[0], torch.einsum("ij->ji", x), x.split(1)[0], x.add_(1), x + 1, x.clone()

    with torch.no_grad():
        dynamo.compile_with(views, backend, watch_modules=True)(torch.ones(3, 3))
    nodes = {node.name: node.meta.get("example_value") for node in captured[0].graph.nodes}
    (base,) = [value for name, value in nodes.items() if name.startswith("l_")]
    same = {name for name, value in nodes.items() if dynamo.storage_id(value) == dynamo.storage_id(base)}
    others = {name for name, value in nodes.items() if isinstance(value, torch.Tensor)} - same
    assert len(same) == 6  # itself, mT, its first row, einsum's, split's, add_'s
    assert len(others) == 2
    assert dynamo.storage_id(3) is None
    assert dynamo.storage_id(torch.ones(2, 2).to_sparse()) is None


def test_random_functions() -> None:
    drawing = (torch.rand_like, torch.ops.aten.bernoulli, torch.ops.aten.rand.default, "normal_", "multinomial")
    assert all(map(dynamo.is_random, (*drawing, nn.functional.gumbel_softmax)))
    assert not any(map(dynamo.is_random, (torch.add, nn.functional.gelu, "view", torch.ops.aten.mm.default, len)))


def test_written_arguments() -> None:
    assert dynamo.written_arguments(torch.ops.aten.add_.Tensor) == {0: "self"}
    assert dynamo.written_arguments(torch.ops.aten.add.out)[3] == "out"
    assert dynamo.written_arguments(torch.ops.aten.mm.default) == {}
    assert dynamo.written_arguments(torch.ops.higher_order.cond) == {}
    assert dynamo.written_arguments(torch.add) is None
    assert dynamo.is_operator(torch.ops.aten.add)
    assert not dynamo.is_operator(torch.add)


def test_tensors_are_copied_at_once_whatever_their_dtypes_and_strides() -> None:
    sources = [torch.arange(6).view(2, 3).t(), torch.rand(4), torch.tensor([True, False]), torch.empty(0)]
    targets = [torch.zeros(one.shape, dtype=one.dtype) for one in sources]
    dynamo.copy_all(targets, sources)
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source)
    dynamo.copy_all([], [])


def test_the_size_that_was_captured() -> None:
    seen: list[int | None] = []

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        made = next(node for node in graph_module.graph.nodes if node.op == "output").args[0][0]
        seen.extend(map(dynamo.likely_size, made.meta["example_value"].shape))
        return graph_module.forward

    x = torch.ones(3, 5)
    dynamo.mark_dynamic(x)
    dynamo.compile_with(lambda x: torch.cat((x, x[:, :2]), dim=1), backend, watch_modules=True)(x)
    assert seen == [3, 7]


def test_inside_of_a_transform() -> None:
    found: list[bool] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        found.append(dynamo.in_transform())
        return x

    note(torch.ones(3))
    torch.vmap(note)(torch.ones(3))
    assert found == [False, True]
