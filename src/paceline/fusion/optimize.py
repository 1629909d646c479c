"""`optimize(model)`: any PyTorch transformer, faster, with the same results.

The model stays the object that it was: its class, weights, hooks and methods. Its `forward` is replaced on the
instance by one that captures what the model computes (torch.compile's Dynamo), rewrites those graphs
(fusion/passes), and runs them. `restore` takes that away again.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import fx, nn

from paceline.errors import UsageError
from paceline.fusion.capture import CapturedGraph
from paceline.fusion.copy import CopiedWeights
from paceline.fusion.direct import DirectCall, learn, signature
from paceline.fusion.dynamo import CaptureError, compile_with, graph_breaks, in_transform, mark_dynamic, quiet
from paceline.fusion.modules import changed_state, hooks, module_state, own_forward, unsupported
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
    graphs: bool = True,
    compile_rest: bool = False,
) -> Model:
    """Make `model` faster, and return it: the same object, whose forward now runs rewritten graphs.

    It is for inference: results carry no gradients. In training mode, under autocast, and where an input requires a
    gradient, the model's own forward runs. `paceline.fusion.report(model)` tells what was replaced and what was not;
    `paceline.fusion.restore(model)` undoes it.

    `dtype`: compute in it, with a copy of the weights (the model's own stay as they are); floating-point inputs are
    converted, and results are in it, as those of `model.to(dtype)` are. `level`: see Options. `quantize`: store the
    weights of linears as "int8", "fp8" or another format of paceline's; the report has the error. `graphs`: on a GPU,
    calls of shapes seen before run as CUDA graphs. `compile_rest`: what no pass replaces is compiled by torch.compile,
    at the first call, in seconds a part. Optimising an optimised model does it anew. Raises UsageError for options that
    do not exist.
    """
    options = Options(dtype, level, quantize, graphs, compile_rest)
    if not isinstance(model, nn.Module):
        raise UsageError(f"optimize takes a torch.nn.Module, got {type(model).__name__}")
    restore(model)
    forward = OptimisedForward(model, options, vars(model).get("forward"))
    vars(model)["forward"] = forward
    if any(kind.__name__ == "GenerationMixin" for kind in type(model).__mro__) and "generate" not in vars(model):
        _optimise_generate(model, forward, options)
    return model


def _optimise_generate(model: Any, forward: OptimisedForward, options: Options) -> None:
    """Our loop behind transformers' `generate`, which calls an encoder by itself."""
    from paceline.fusion.generate import Generate  # needs transformers, of which the model is

    vars(model)["generate"] = Generate(model, forward)
    if model.config.is_encoder_decoder:
        encoder = model.get_encoder()
        if not isinstance(vars(encoder).get("forward"), OptimisedForward):
            vars(encoder)["forward"] = OptimisedForward(encoder, options, vars(encoder).get("forward"), forward)


def restore(model: Model) -> Model:
    """Give an optimised model its own forward back, and return it. A model that is not optimised stays as it is."""
    forward = vars(model).get("forward")
    if isinstance(forward, OptimisedForward):
        for module in model.modules():
            part = vars(module).get("forward")
            if isinstance(part, OptimisedForward) and forward in (part, part.whole):
                del vars(module)["forward"]
                if part.replaced is not None:
                    vars(module)["forward"] = part.replaced
        if getattr(vars(model).get("generate"), "forward", None) is forward:
            del vars(model)["generate"]
    return model


def optimised_of(model: nn.Module) -> OptimisedForward:
    """What runs an optimised model. Raises UsageError for any other."""
    found = vars(model).get("forward")
    if not isinstance(found, OptimisedForward):
        raise UsageError(f"{type(model).__name__} is not optimised: call paceline.optimize(model) first")
    return found


def report(model: nn.Module) -> Report:
    """What was replaced in a model that optimize() returned, what was not, and why. Raises UsageError for any other."""
    return optimised_of(model).report


class OptimisedForward:
    """What `model.forward` becomes. A copy or a pickle of the model brings it along, with nothing captured yet.

    `original`: the model's own forward. `replaced`: that, where it was set on the instance and not by its class.
    `whole`: of the model that this one is a part of and was optimised with; they have one report.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        replaced: Callable[..., Any] | None = None,
        whole: OptimisedForward | None = None,
    ) -> None:
        self.report: Report = Report(type(model).__name__) if whole is None else whole.report
        self.replaced = replaced
        self.whole = whole
        self._model = model
        self._options = options
        self._copy: CopiedWeights | None = None
        self._graphs: list[CapturedGraph] = []
        self._copies: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
        self._compiled: Callable[..., Any] | None = None
        self._hookless: list[dict[Any, Any]] = []
        self._shapes: set[tuple[Any, ...]] = set()
        self._direct: dict[Hashable, DirectCall | None] = {}
        self._broken = False  # whether some of its code is left to Python, which may branch by what it computed
        self._breaks = Counter(graph_breaks())
        functools.update_wrapper(self, self.original)  # libraries look at its signature

    @property
    def original(self) -> Callable[..., Any]:
        return own_forward(self._model) if self.replaced is None else self.replaced

    @property
    def uncaptured(self) -> Callable[..., Any]:
        """The model's own code, in the dtype that was asked for once a call was computed in it."""
        return self.original if self._copy is None else own_forward(self._copy.model)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimisedForward:
        replaced = copy.deepcopy(self.replaced, memo)
        whole = copy.deepcopy(self.whole, memo)
        return OptimisedForward(copy.deepcopy(self._model, memo), self._options, replaced, whole)

    def __reduce__(self) -> tuple[Any, ...]:
        return OptimisedForward, (self._model, self._options, self.replaced, self.whole)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a part of an optimised or compiled model: its forward is captured with it
            return self.original(*args, **kwargs)
        if self._options.level == "fast" and self._copy is None and not in_transform():
            known = signature(args, kwargs)
            if known is not None:
                return self._fast(*known, args, kwargs)
        return self._guarded(args, kwargs)

    def _fast(
        self, key: Hashable, tensors: Sequence[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call of plain arguments: without Dynamo where one like it was one graph."""
        direct = self._direct.get(key)
        if direct is not None and self._refusal(tensors) is None:
            with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
                return direct(tensors)
        if key in self._direct:
            return self._guarded(args, kwargs)
        graphs, breaks = len(self._graphs), graph_breaks()
        calls, result = self._recorded(args, kwargs)
        if len(self._graphs) != graphs:  # captured now, to be learned next time
            self._broken = self._broken or graph_breaks() != breaks
        elif self._options.level == "fast":
            if len(self._direct) >= MOST_SHAPES:
                self._direct.clear()
            self._direct[key] = None if self._broken else learn(calls, tensors, result)
        return result

    def _guarded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = list(_tensors((args, kwargs)))
        reason = self._refusal(tensors)
        if reason is not None:
            self.report.leave(reason)
            return self.original(*args, **kwargs)
        new = self._is_new(tensors)
        run = self._compiled_now()
        given = args, kwargs
        if self._copy is not None:
            if self._options.level == "safe":
                self._copy.refresh()
            given = self._copy.converted(args, kwargs)
        try:
            with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
                return self._watched(run, *given) if new else run(*given[0], **given[1])
        except CaptureError as error:
            self.report.leave(f"it could not be captured: {str(error).strip().splitlines()[0]}")
        return self.original(*args, **kwargs)  # where the model itself raises, its error alone is seen

    def _is_new(self, tensors: list[torch.Tensor]) -> bool:
        """Whether tensors of these shapes come for the first time."""
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if shapes in self._shapes:
            return False
        if len(self._shapes) >= MOST_SHAPES:
            self._shapes.clear()
        self._shapes.add(shapes)
        for tensor in tensors:
            mark_dynamic(tensor)
        return True

    def _watched(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that may capture."""
        graphs = len(self.report.graphs)
        held = module_state(self._target) if self._options.level == "fast" else None
        with quiet():
            result = run(*args, **kwargs)
        if len(self.report.graphs) != graphs:
            self.report.breaks = Counter(graph_breaks()) - self._breaks
        if not self.report.graphs:
            self.report.leave("Dynamo captured nothing of it")
        if held is not None and changed_state(held, module_state(self._target)):
            self.report.note('level "safe" is used: its forward changes what its modules hold')
            self._options = replace(self._options, level="safe")
            self._compiled = None
            self._direct.clear()
            self._shapes.clear()
        return result

    @property
    def _target(self) -> nn.Module:
        """The model that is captured: itself, or its copy in another dtype."""
        return self._model if self._copy is None else self._copy.model

    def _compiled_now(self) -> Callable[..., Any]:
        # Dynamo does not notice the first hook of a module that had none when it captured.
        if self._compiled is None or (self._options.level == "safe" and any(self._hookless)):
            self._compiled = self._compile()
        return self._compiled

    def _compile(self) -> Callable[..., Any]:
        if self._options.dtype is not None and self._copy is None:
            self._copy = CopiedWeights(self._model, self._options.dtype)
        model = self._target
        parameters = list(inspect.signature(self.original).parameters)
        self._hookless = [found for found in hooks(model) if not found]

        def backend(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            weights = set(map(id, (*model.parameters(), *model.buffers())))
            captured = CapturedGraph(graph_module, example_inputs, weights, self._options, parameters, self._copies)
            self._graphs.append(captured)
            self.report.graphs.append(captured.report)
            return captured

        return compile_with(self.uncaptured, backend, watch_modules=self._options.level == "safe")

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[CapturedGraph, list[Any]]]:
        """The captured graphs that a call runs, in order, with what each is given."""
        return [(graph, inputs) for graph, inputs, _ in self._recorded(args, kwargs)[0]]

    def _recorded(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[tuple[CapturedGraph, list[Any], Any]], Any]:
        """The same with what each returned, and the call's result."""
        calls: list[tuple[CapturedGraph, list[Any], Any]] = []
        for graph in self._graphs:
            graph.recorder = lambda *call: calls.append(call)
        try:
            return calls, self._guarded(args, kwargs)
        finally:
            for graph in self._graphs:
                graph.recorder = None

    def _refusal(self, tensors: Sequence[torch.Tensor]) -> str | None:
        """Why this call is not for an optimised graph."""
        if self._model.training:
            return "it is in training mode: call model.eval()"
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return "an input requires a gradient"
        kinds = {tensor.device.type for tensor in tensors} - {"meta"}
        if any(torch.is_autocast_enabled(kind) for kind in kinds):
            return "autocast is on: pass dtype= to optimize instead"
        if self._compiled is None:
            return unsupported(self._model, converted=self._options.dtype is not None)
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
