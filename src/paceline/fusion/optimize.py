"""`optimize(model)`: any PyTorch transformer, faster, with the same results.

The model stays the object that it was: its class, weights, hooks and methods. Its `forward` is replaced on the
instance by one that captures what the model computes (torch.compile's Dynamo), rewrites those graphs
(fusion/passes), and runs them. `restore` takes that away again.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import fx, nn

from paceline.errors import UsageError
from paceline.fusion.capture import CapturedGraph
from paceline.fusion.copy import CopiedWeights
from paceline.fusion.dynamo import CaptureError, compile_with, graph_breaks, mark_dynamic
from paceline.fusion.options import Options
from paceline.fusion.report import Report

Model = TypeVar("Model", bound=nn.Module)
MOST_SHAPES = 4096  # remembered as marked; beyond it they are marked again, which costs microseconds


def optimize(
    model: Model,
    *,
    dtype: torch.dtype | None = None,
    level: Literal["safe", "fast"] = "safe",
    quantize: str | None = None,
) -> Model:
    """Make `model` faster, and return it: the same object, whose forward now runs rewritten graphs.

    It is for inference: results carry no gradients. In training mode, under autocast, and where an input requires a
    gradient, the model's own forward runs. `paceline.fusion.report(model)` tells what was replaced and what was not;
    `paceline.fusion.restore(model)` undoes it.

    `dtype`: compute in it, with a copy of the weights (the model's own stay as they are); floating-point inputs are
    converted, and results are in it, as those of `model.to(dtype)` are. `level`: see Options. `quantize`: store the
    weights of linears as "int8", "fp8" or another format of paceline's; the report has the error. Optimising an
    optimised model does it anew. Raises UsageError for options that do not exist.
    """
    options = Options(dtype, level, quantize)
    if not isinstance(model, nn.Module):
        raise UsageError(f"optimize takes a torch.nn.Module, got {type(model).__name__}")
    restore(model)
    vars(model)["forward"] = _forward(model, options)
    return model


def restore(model: Model) -> Model:
    """Give an optimised model its own forward back, and return it. A model that is not optimised stays as it is."""
    if isinstance(getattr(vars(model).get("forward"), "optimised", None), Optimised):
        original = optimised_of(model).original
        del vars(model)["forward"]
        if getattr(model.forward, "__func__", model.forward) is not getattr(original, "__func__", original):
            vars(model)["forward"] = original  # it had one of its own on the instance
    return model


def optimised_of(model: nn.Module) -> Optimised:
    """What runs an optimised model. Raises UsageError for any other."""
    found = getattr(vars(model).get("forward"), "optimised", None)
    if not isinstance(found, Optimised):
        raise UsageError(f"{type(model).__name__} is not optimised: call paceline.optimize(model) first")
    return found


def report(model: nn.Module) -> Report:
    """What was replaced in a model that optimize() returned, what was not, and why. Raises UsageError for any other."""
    return optimised_of(model).report


def _forward(model: nn.Module, options: Options) -> Callable[..., Any]:
    """What `model.forward` becomes. Its attribute `optimised` is what runs behind it."""
    original = model.forward
    optimised = Optimised(model, original, options)

    # A function, not an object with __call__: a library may look at its signature, and Dynamo may trace it.
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return optimised(args, kwargs)

    forward.optimised = optimised  # type: ignore[attr-defined]
    return forward


class Optimised:
    """`original`: the model's own forward. `report`: what became of it."""

    def __init__(self, model: nn.Module, original: Callable[..., Any], options: Options) -> None:
        self._model = model
        self.original = original
        self._options = options
        self.report = Report(type(model).__name__)
        self._graphs: list[CapturedGraph] = []
        self._copy = CopiedWeights(model, original, options.dtype) if options.dtype is not None else None
        self._compiled: Callable[..., Any] | None = None
        self._shapes: set[tuple[Any, ...]] = set()
        self._breaks = Counter(graph_breaks())

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = list(_tensors((args, kwargs)))
        reason = self._refusal(tensors)
        if reason is not None:
            self.report.leave(reason)
            return self.original(*args, **kwargs)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if shapes not in self._shapes:
            if len(self._shapes) >= MOST_SHAPES:
                self._shapes.clear()
            self._shapes.add(shapes)
            for tensor in tensors:
                mark_dynamic(tensor)
        if self._copy is not None:
            if self._options.level == "safe":
                self._copy.refresh()
            args, kwargs = self._copy.converted(args, kwargs)
        try:
            return self._run(args, kwargs)
        except CaptureError as error:
            self.report.leave(f"it could not be captured: {str(error).strip().splitlines()[0]}")
            return self.original(*args, **kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run, graphs = self._compiled or self._compile(), len(self.report.graphs)
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            result = run(*args, **kwargs)
        if len(self.report.graphs) != graphs:
            self.report.breaks = Counter(graph_breaks()) - self._breaks
        return result

    def _compile(self) -> Callable[..., Any]:
        function = self.original if self._copy is None else self._copy.forward
        model = self._model if self._copy is None else self._copy.model
        parameters = list(inspect.signature(self.original).parameters)

        def backend(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            weights = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
            captured = CapturedGraph(graph_module, example_inputs, weights, self._options, parameters)
            self._graphs.append(captured)
            self.report.graphs.append(captured.report)
            return captured

        self._compiled = compile_with(function, backend, watch_modules=self._options.level == "safe")
        return self._compiled

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[CapturedGraph, list[Any]]]:
        """The captured graphs that a call runs, in order, with what each is given."""
        calls: list[tuple[CapturedGraph, list[Any]]] = []
        for graph in self._graphs:
            graph.recorder = lambda graph, inputs: calls.append((graph, inputs))
        try:
            self(args, kwargs)
        finally:
            for graph in self._graphs:
                graph.recorder = None
        return calls

    def _refusal(self, tensors: list[torch.Tensor]) -> str | None:
        """Why this call is not for an optimised graph."""
        if self._model.training:
            return "it is in training mode: call model.eval()"
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return "an input requires a gradient"
        if any(torch.is_autocast_enabled(kind) for kind in {tensor.device.type for tensor in tensors}):
            return "autocast is on: pass dtype= to optimize instead"
        if torch.compiler.is_compiling():
            return "it is being compiled by somebody else"
        return None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments, in lists, tuples and dicts too."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
