"""From a graph that Dynamo captured to what runs in its place.

The model's weights become constants of the graph, so that passes may pack, join and fold them. On its first call the
rewritten graph is compared with the captured one on the same inputs, and dropped where they differ: a pass that is
wrong about a model costs its speed-up, never a result.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Hashable, Sequence, Set
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx
from torch.utils import _pytree as pytree

from paceline.fusion.cuda_graphs import CudaRecorder, GraphPool
from paceline.fusion.effects import mark_touched, refusal
from paceline.fusion.graph import stamp
from paceline.fusion.malloc import keep_freed_memory
from paceline.fusion.options import Options
from paceline.fusion.packing import count_tokens
from paceline.fusion.passes import compile_rest, compile_what_is_left, leave_out_padding, run_passes
from paceline.fusion.passes.padding import attention_mask
from paceline.fusion.report import GraphReport
from paceline.fusion.results import own_results
from paceline.fusion.rewrite import Rewrite
from paceline.log import get_logger

log = get_logger(__name__)

# The largest difference of a row of a result, relative to its rows' usual length, that other orders of the same sums
# explain.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
SHORT = 16  # rows of fewer elements are taken together: their lengths vary too much
MOST_BUILDS = 8  # of one graph in a row: a model that writes to its weights itself would pay for one at each call


class CapturedGraph:
    """Takes what Dynamo gives the captured graph at each call, and returns what that would. `weights`: the ids of
    the model's tensors. `parameters`: those of its forward, in order. `copies`: of its weights, in the form that its
    graphs have them."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        example_inputs: Sequence[Any],
        weights: Set[int],
        options: Options,
        parameters: Sequence[str],
        copies: WeakValueDictionary[Hashable, Any],
    ) -> None:
        self._captured = graph_module
        self._options = options
        self._parameters = parameters
        self._copies = copies
        self._weight_places = [place for place, value in enumerate(example_inputs) if id(value) in weights]
        self._input_places = [place for place in range(len(example_inputs)) if place not in set(self._weight_places)]
        self._weights: tuple[torch.Tensor, ...] = ()
        self._stamps: list[tuple[torch.Tensor, tuple[int, int]]] = []
        self._run: Callable[..., Any] | None = None
        self._mask_place: int | None = None  # among the inputs, where padding is left out
        self._builds = 0
        self.recorder: Callable[[CapturedGraph, list[Any], Any], None] | None = None
        self.is_plain = False  # whether `run` may stand for a call: rewritten, and writing to no input
        self.report = GraphReport(len(graph_module.graph.nodes), len(graph_module.graph.nodes))

    def __call__(self, *args: Any) -> Any:
        inputs = [args[place] for place in self._input_places]
        result = self._result(args, inputs)
        if self.recorder is not None:
            self.recorder(self, inputs, result)
        return result

    def _result(self, args: Sequence[Any], inputs: list[Any]) -> Any:
        if self.report.refused is not None:
            return self._captured.forward(*args)
        if self._run is None or (self._options.level == "safe" and self._is_stale(args)):
            return self._build_and_check(args, inputs)
        self._builds = 0
        return self.run(inputs)

    def run(self, inputs: list[Any]) -> Any:
        """The rewritten graph, as the weights were. `inputs`: in the graph's order, without weights."""
        assert self._run is not None
        return self._run(*self._given(inputs))

    def _given(self, inputs: list[Any]) -> list[Any]:
        """What the rewritten graph takes: without padding, how many tokens there are too."""
        return inputs if self._mask_place is None else [*inputs, count_tokens(inputs[self._mask_place])]

    def with_passes(self, count: int) -> fx.GraphModule:
        """The captured graph behind the first `count` passes, for measuring. It takes what `record` gets."""
        bound = _bind(self._captured, self._weight_places, self._weights)
        rewrite = Rewrite(bound, self._options, GraphReport(0), self._parameters, copies=self._copies)
        run_passes(rewrite, count)
        return rewrite.module

    def _is_stale(self, args: Sequence[Any]) -> bool:
        """Whether a weight is another than when the graph was rewritten, or was written to."""
        if not all(map(operator.is_, (args[place] for place in self._weight_places), self._weights)):
            return True
        return any(stamp(tensor) != before for tensor, before in self._stamps)

    def _build_and_check(self, args: Sequence[Any], inputs: list[Any]) -> Any:
        self._run = self._mask_place = None
        self.is_plain = False
        self._builds += 1
        self._weights = tuple(args[place] for place in self._weight_places)
        bound = _bind(self._captured, self._weight_places, self._weights)
        mark_touched(bound.graph)
        self.report.replaced.clear()
        self.report.left.clear()
        self.report.refused = self._refusal(bound.graph)
        if self.report.refused is not None:
            return self._captured.forward(*args)
        copies = _cloned(inputs)
        expected = bound.forward(*inputs)
        rewrite = Rewrite(_copy(bound), self._options, self.report, self._parameters, copies=self._copies)
        try:
            run_passes(rewrite)
            result = rewrite.module.forward(*copies)
            own_results(rewrite.module, (expected, inputs), (result, copies), self._weights)
            # The inputs too: a graph may write to them.
            found = difference((expected, inputs), (result, copies))
            # What quantised weights change is for the caller to judge, who asked for them.
            wrong = found is None or not (found <= self._tolerance(expected) or self._options.quantize)
            if self._options.level == "fast" and not wrong:
                rewrite = self._without_padding(rewrite, inputs)
            if self._options.compile_rest and not wrong:
                rewrite = self._with_rest_compiled(rewrite, inputs)
        except Exception as error:  # a pass that is wrong about a model must not end the caller's call
            self._drop(f"it failed with {type(error).__name__}: {' '.join(str(error).strip().splitlines()[:1])}")
            return expected
        self.report.error = found
        if wrong:
            by = "" if found is None else f" by {found:.1e}"
            self._drop(f"its results differ from the model's own{by}")
            return expected
        own = set(map(id, self._weights))  # a joined weight that was packed is a copy itself
        copied = {id(tensor): tensor for tensor in rewrite.copied if id(tensor) in own}.values()
        self._stamps = [(tensor, stamp(tensor)) for tensor in copied]
        self.report.copied_bytes = sum(tensor.nbytes for tensor in copied)
        self.report.nodes_after = len(rewrite.graph.nodes)
        mark_touched(rewrite.graph)
        writes = any(node.op == "placeholder" and not rewrite.is_free(node) for node in rewrite.graph.nodes)
        self.is_plain = not writes
        self._run = self._graphed(rewrite, inputs, writes)
        if any(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in inputs):
            keep_freed_memory()
        return expected

    def _graphed(self, rewrite: Rewrite, inputs: list[Any], writes: bool) -> Callable[..., Any]:
        """The rewritten graph; on a GPU in CUDA graphs, unless it writes to what it is given."""
        forward: Callable[..., Any] = rewrite.module.forward
        devices = {value.device for value in inputs if isinstance(value, torch.Tensor)}
        if writes or not self._options.graphs or len(devices) != 1 or (device := devices.pop()).type != "cuda":
            return forward
        pool = GraphPool(forward, CudaRecorder(device))
        self.report.cuda_graphs = pool.counts
        return pool

    def _without_padding(self, rewrite: Rewrite, inputs: list[Any]) -> Rewrite:
        """The graph that computes nothing at padding, where there is one and it gives the tokens what they should get:
        with the caller's mask, and with others that leave out more."""
        packed = replace(rewrite, module=_copy(rewrite.module))
        mask = attention_mask(packed)
        if mask is None or not leave_out_padding(packed):
            return rewrite
        place = [node.target for node in packed.graph.nodes if node.op == "placeholder"].index(mask.target)
        self._mask_place = place
        for tried in (inputs[place], _shorter(inputs[place], 1), _shorter(inputs[place], 2)):
            with_mask = [*inputs[:place], tried, *inputs[place + 1 :]]
            padded = rewrite.module.forward(*_cloned(with_mask))
            unpadded = packed.module.forward(*self._given(_cloned(with_mask)))
            at_tokens = functools.partial(_at_tokens, mask_BS=tried)
            expected, result = (pytree.tree_map_only(torch.Tensor, at_tokens, one) for one in (padded, unpadded))
            found = difference(expected, result)
            if found is None or not found <= self._tolerance(expected):
                del self.report.replaced["padding left out"]
                self.report.left["padding is computed: what stands there changes what tokens get"] += 1
                self._mask_place = None
                return rewrite
        return packed

    def _with_rest_compiled(self, rewrite: Rewrite, inputs: list[Any]) -> Rewrite:
        """The graph whose rest torch.compile compiles, now, where that gives what the graph gives."""
        compiled = replace(rewrite, module=_copy(rewrite.module))
        compile_what_is_left(compiled)
        first, second = self._given(_cloned(inputs)), self._given(_cloned(inputs))
        expected, result = rewrite.module.forward(*first), compiled.module.forward(*second)
        own_results(compiled.module, (expected, first), (result, second), self._weights)
        found = difference((expected, first), (result, second))
        if found is not None and found <= self._tolerance(expected):
            return compiled
        compile_rest.forget(rewrite.report)
        by = "" if found is None else f" by {found:.1e}"
        rewrite.leave(f"the rest stays eager: torch.compile's results differ{by}")
        return rewrite

    def _refusal(self, graph: fx.Graph) -> str | None:
        if self._builds > MOST_BUILDS:
            return "its weights change from call to call"
        if self._options.level == "safe" and any(weight.is_inference() for weight in self._weights):
            return "its weights were made in inference mode, where no change of them can be noticed"
        return refusal(graph)

    def _tolerance(self, results: Any) -> float:
        """Of the coarsest dtype: what is computed in bfloat16 may be returned in float32."""
        values = (*pytree.tree_leaves(results), *self._weights)
        return max(
            (TOLERANCE.get(value.dtype, 0.0) for value in values if isinstance(value, torch.Tensor)), default=0.0
        )

    def _drop(self, reason: str) -> None:
        self.report.refused = reason
        log.warning("a rewritten graph is dropped, and the captured one runs: %s", reason)


def _cloned(inputs: list[Any]) -> list[Any]:
    return pytree.tree_map_only(torch.Tensor, torch.clone, inputs)  # type: ignore[no-any-return]


def _shorter(mask_BS: torch.Tensor, seed: int) -> torch.Tensor:
    """The mask with each row's end masked, from a place that the seed chooses; the first token stays."""
    batch, length = mask_BS.shape
    draw = torch.rand(batch, 1, generator=torch.Generator().manual_seed(seed)).to(mask_BS.device)
    kept = torch.arange(length, device=mask_BS.device) < (draw * length).ceil().clamp(min=1)
    return mask_BS * kept.to(mask_BS.dtype)


def _at_tokens(result: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
    """A result with zeros at padding, if it has one row a token."""
    if result.shape[:2] != mask_BS.shape:
        return result
    real = mask_BS.bool().view(*mask_BS.shape, *[1] * (result.dim() - 2))
    return torch.where(real, result, torch.zeros((), dtype=result.dtype, device=result.device))


def _copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    made = fx.GraphModule(graph_module, graph)
    vars(made).update({name: value for name, value in vars(graph_module).items() if name.startswith("constant_")})
    return made


def _bind(captured: fx.GraphModule, places: Sequence[int], weights: Sequence[torch.Tensor]) -> fx.GraphModule:
    """A copy of the captured graph in which the inputs at these places are constants."""
    bound = _copy(captured)
    inputs = [node for node in bound.graph.nodes if node.op == "placeholder"]
    for place, weight in zip(places, weights, strict=True):
        name = f"constant_{place}"
        vars(bound)[name] = weight
        with bound.graph.inserting_before(inputs[place]):
            node = bound.graph.create_node("get_attr", name)
        node.meta["example_value"] = inputs[place].meta.get("example_value", weight)
        node.meta["source"] = str(inputs[place].target)
        inputs[place].replace_all_uses_with(node)
        bound.graph.erase_node(inputs[place])
    bound.recompile()
    return bound


def difference(expected: Any, result: Any) -> float | None:
    """The largest difference of two results' rows, as vectors, relative to the root mean square of the rows' lengths;
    None where they are of another form, or differ in anything but the digits of floating-point numbers."""
    first, form = pytree.tree_flatten(expected)
    second, other_form = pytree.tree_flatten(result)
    if form != other_form:
        return None
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        found = _leaf_difference(a, b)
        if found is None:
            return None
        worst = max(worst, found)
    return worst


def _leaf_difference(a: Any, b: Any) -> float | None:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return 0.0 if a is b or (not isinstance(b, torch.Tensor) and a == b) else None
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return None
    if not a.dtype.is_floating_point:
        return 0.0 if torch.equal(a, b) else None
    x, y = a.double(), b.double()
    finite = x.isfinite()
    if not torch.equal(finite, y.isfinite()) or not torch.equal(x[~finite].nan_to_num(), y[~finite].nan_to_num()):
        return None
    if not x.numel():
        return 0.0
    x, y = x.where(finite, 0.0), y.where(finite, 0.0)
    width = x.shape[-1] if x.dim() and x.shape[-1] >= SHORT else x.numel()
    length = math.sqrt(float(x.square().sum()) * width / x.numel())
    worst = math.sqrt(float((x - y).reshape(-1, width).square().sum(-1).max()))
    return worst / length if length else worst
