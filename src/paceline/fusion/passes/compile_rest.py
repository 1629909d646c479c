"""What no pass has replaced goes to torch.compile, where the caller asks for it: rotary embeddings of other forms,
masks, gates, a hand-written model's own arithmetic become a few kernels.

Nodes run in waves: all of torch's own that can run together, then what needs those, and so on. The first are a part,
compiled as one function; so there are no cycles between parts, and as few parts as can be. Views belong to no part:
whoever needs one, a part or what is left between parts, makes it itself from what was computed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx, nn

from paceline.fusion.dynamo import compiled, mark_sizes
from paceline.fusion.effects import has_effect, memory_of
from paceline.fusion.graph import fake, name_of, spelled
from paceline.fusion.report import GraphReport
from paceline.fusion.rewrite import Rewrite
from paceline.log import get_logger

log = get_logger(__name__)

PARTS, NODES = "parts by torch.compile", "nodes in them"
NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
# Whose kernels torch.compile takes as they are: with one of these alone it gains nothing.
NOT_FUSED = {"linear", "matmul", "bmm", "baddbmm", "addmm", "sdpa", "conv1d", "conv2d", "embedding"}


def apply(rewrite: Rewrite) -> None:
    if not rewrite.options.compile_rest:
        return
    computing, views = _compilable(rewrite)
    waves = _waves(rewrite, computing, views)
    *nodes, output = rewrite.graph.nodes
    for node in sorted(nodes, key=waves.__getitem__):
        output.prepend(node)
    groups: dict[int, list[fx.Node]] = {}
    for node in computing:
        groups.setdefault(waves[node], []).append(node)
    made: dict[Hashable, str] = {}
    for group in groups.values():
        if sum(name_of(node) not in NOT_FUSED for node in group) > 1:
            _replace(rewrite, group, views, made)
            rewrite.count(PARTS)
            rewrite.report.replaced[NODES] += len(group)


def forget(report: GraphReport) -> None:
    """Count none of it."""
    del report.replaced[PARTS], report.replaced[NODES]


class Part(nn.Module):
    """Some nodes as one function: compiled at its first call, for any sizes that `shapes`, of its inputs, has symbols
    for; node by node once that fails, with the reason in the report."""

    def __init__(self, plain: Callable[..., Any], shapes: Sequence[Any], report: GraphReport) -> None:
        super().__init__()
        self._plain = plain
        self._compiled: Callable[..., Any] | None = compiled(plain)
        self._shapes: Sequence[Any] | None = shapes
        self._report = report

    def forward(self, *inputs: Any) -> Any:
        if self._compiled is None:
            return self._plain(*inputs)
        if self._shapes is not None:
            inputs = tuple(map(_marked, inputs, self._shapes))
            self._shapes = None
        try:
            return self._compiled(*inputs)
        except Exception as error:  # whatever a compiler raises must not end the caller's call
            result = self._plain(*inputs)  # what is not the compiler's fault is raised here, and counts for nothing
            self._compiled = None
            reason = f"a part stays eager: torch.compile failed with {_said(error)}"
            if not self._report.left[reason]:
                log.warning("%s", reason)
            self._report.left[reason] += 1
            return result


def _marked(value: Any, shape: Sequence[Any]) -> Any:
    """A view that tells torch.compile which sizes may change: such a mark on a tensor of the model's would make Dynamo
    capture the model again. A parameter's sizes are fixed for it anyway."""
    if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
        return value
    view = value.detach()
    mark_sizes(view, shape)
    return view


def _said(error: Exception) -> str:
    cause = getattr(error, "inner_exception", error)  # a backend's is wrapped
    return f"{type(cause).__name__}: {' '.join(str(cause).strip().splitlines()[:1])}"


def _compilable(rewrite: Rewrite) -> tuple[dict[fx.Node, None], set[fx.Node]]:
    """Torch's own nodes, those that compute tensors, in order, and those that look at them: views, sizes, numbers. None
    that changes memory, or sees memory that is changed."""
    computing: dict[fx.Node, None] = {}
    views: set[fx.Node] = set()
    for node in rewrite.graph.nodes:
        sources = node.all_input_nodes
        known = all(
            isinstance(fake(one), (torch.Tensor, *NUMBERS)) or one in computing or one in views for one in sources
        )
        if not spelled(node) or not known or has_effect(node) or not rewrite.is_free(node, *sources):
            continue
        if _is_view(node):
            views.add(node)
        else:
            computing[node] = None
    return computing, views


def _is_view(node: fx.Node) -> bool:
    sources = node.all_input_nodes
    if name_of(node) == "getitem" and not any(isinstance(fake(index), torch.Tensor) for index in sources[1:]):
        return True  # though a pass has put another tensor there than it was of
    return memory_of(node) <= {place for one in sources for place in memory_of(one)}


def _waves(rewrite: Rewrite, computing: dict[fx.Node, None], views: set[fx.Node]) -> dict[fx.Node, int]:
    """When each node runs: what may be compiled in even waves, all else in odd ones, and a view with what it is of."""
    waves: dict[fx.Node, int] = {}
    ordered: set[fx.Node] = set()  # what changes memory, or sees memory that is changed, and inputs
    last = -1
    for node in rewrite.graph.nodes:
        wave = max((waves[source] for source in node.all_input_nodes), default=-1)
        if node not in views:
            wave += (wave % 2 == 0) != (node in computing)
        if has_effect(node) or not rewrite.is_free(node, *node.all_input_nodes):
            ordered.add(node)
            wave = last = max(wave, last)
        waves[node] = wave
    # What need not be early waits: else a decoder's keys and values of all layers would lie in memory at once.
    for node in reversed(rewrite.graph.nodes):
        if node not in computing and node not in ordered and node.users:
            waves[node] = max(waves[node], min(waves[user] - (user in computing) for user in node.users))
    return waves


def _replace(rewrite: Rewrite, group: list[fx.Node], views: set[fx.Node], made: dict[Hashable, str]) -> None:
    """One call in the place of a group. `made`: names of parts by what they compute: those that are alike, as of one
    layer and the next, are one function."""
    members, graph = set(group), fx.Graph()
    inside: dict[fx.Node, fx.Node] = {}
    given: dict[fx.Node, fx.Node] = {}

    def take(node: fx.Node) -> fx.Node:
        if node not in inside:
            if node in members or node in views:
                args, kwargs = fx.map_arg((node.args, node.kwargs), take)
                inside[node] = graph.create_node(node.op, node.target, args, kwargs)
            else:
                inside[node] = graph.placeholder(f"input_{len(given)}")
                given[inside[node]] = node
        return inside[node]

    results = [node for node in group if _is_seen(node, members, views)]
    graph.output(tuple(take(node) for node in results))
    inputs = [given[node] for node in graph.nodes if node.op == "placeholder"]
    function = fx.GraphModule(nn.Module(), graph)
    shapes = [tuple(value.shape) if isinstance(value := fake(node), torch.Tensor) else () for node in inputs]
    key = function.code, str(shapes)
    if key not in made:
        made[key] = f"part_{len(made)}"
        rewrite.module.add_module(made[key], Part(function.forward, shapes, rewrite.report))
    with rewrite.graph.inserting_before(group[0]):
        # What the caller gives carries marks of its own (dynamo.mark_dynamic), which would be compiled for anew.
        unmarked = [rewrite.graph.call_method("detach", (node,)) if _is_tensor_input(node) else node for node in inputs]
        part = rewrite.graph.call_module(made[key], tuple(unmarked))
        part.meta["example_value"] = tuple(fake(node) for node in results)
        for place, node in enumerate(results):
            result = rewrite.graph.call_function(operator.getitem, (part, place))
            result.meta["example_value"] = fake(node)
            node.replace_all_uses_with(result)


def _is_tensor_input(node: fx.Node) -> bool:
    return node.op == "placeholder" and isinstance(fake(node), torch.Tensor)


def _is_seen(node: fx.Node, members: set[fx.Node], views: set[fx.Node]) -> bool:
    """Whether anything but the members uses a node, or a view of it."""
    return any(user not in members and (user not in views or _is_seen(user, members, views)) for user in node.users)
