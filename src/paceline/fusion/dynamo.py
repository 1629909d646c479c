"""Every name of torch that fusion uses and that torch does not promise to keep. tests/fusion/test_dynamo.py asks each
of them of the torch that runs it; a release that moves one is mended here."""

from __future__ import annotations

import inspect
import logging
import re
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo as torch_dynamo
from torch._dynamo.exc import TorchDynamoException

CaptureError = TorchDynamoException  # what Dynamo raises for code that it, or a backend, cannot take

Backend = Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]
MOST_CAPTURES = 64  # of one model: batch 1 or more, each set of arguments, each dtype, ... torch's own limit is 8


def compile_with(function: Callable[..., Any], backend: Backend, *, watch_modules: bool) -> Callable[..., Any]:
    """`function` captured graph by graph for `backend`, guarded by Dynamo. `watch_modules`: notice a change of what
    modules hold besides tensors."""
    options: dict[str, Any] | None = None
    if not watch_modules:
        options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    return torch.compile(_own_code(function), backend=backend, options=options, **_limit())


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by torch.compile's own compiler, for any sizes. Calling it raises what cannot be compiled."""
    return torch.compile(function, dynamic=True, fullgraph=True, **_limit())


def _limit() -> dict[str, Any]:
    known = inspect.signature(torch.compile).parameters
    return {"recompile_limit": MOST_CAPTURES} if "recompile_limit" in known else {}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the page that torch logs for an operation that cannot be: the model's own error follows."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls `function`, with a code object of its own: Dynamo counts captures by code object, so that
    otherwise every optimised model would draw on one limit."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return types.FunctionType(
        forward.__code__.replace(), forward.__globals__, forward.__name__, None, forward.__closure__
    )


def parameter_of(placeholder: str, positional: Sequence[str]) -> str | None:
    """Which parameter of the captured function an input of a graph is, by the name Dynamo gave it; None for what is
    inside of one. `positional`: the function's parameters in order."""
    given = re.fullmatch(r"L_args_(\d+)_", placeholder)
    if given is not None:
        return positional[int(given[1])] if int(given[1]) < len(positional) else None
    named = re.fullmatch(r"L_kwargs_(\w+)_", placeholder)
    return None if named is None else named[1]


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Each source into its target, by one kernel a dtype on a GPU: three tensors take the host 11 us, one by one 31."""
    if targets:
        torch._foreach_copy_(targets, sources)  # type: ignore[arg-type]


def likely_size(size: int | torch.SymInt) -> int | None:
    """What a size was when it was captured; None where that is not known."""
    return size if isinstance(size, int) else size.node.hint


def mark_dynamic(tensor: torch.Tensor) -> None:
    """Capture any size of the tensor's dimensions, where the code allows it."""
    for dim in range(tensor.dim()):
        torch_dynamo.maybe_mark_dynamic(tensor, dim)


def mark_sizes(tensor: torch.Tensor, sizes: Sequence[Any]) -> None:
    """Compile the tensor for any size where `sizes` has a symbol, and for its own elsewhere."""
    for dim, size in enumerate(sizes):
        (torch_dynamo.mark_static if isinstance(size, int) else torch_dynamo.maybe_mark_dynamic)(tensor, dim)


def graph_breaks() -> dict[str, int]:
    """Why captures have ended early so far, each reason's first line with its count."""
    found: dict[str, int] = {}
    for reason, count in torch_dynamo.utils.counters["graph_break"].items():
        line = str(reason).strip().splitlines()[0]
        found[line] = found.get(line, 0) + count
    return found


def storage_id(value: Any) -> int | None:
    """The same for tensors, fake ones too, that lie in one memory; None for what has none to share (numbers, sparse
    tensors, oneDNN's packed ones), 0 where it is not told (inside torch.vmap)."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except NotImplementedError:
        return 0


def is_random(target: Any) -> bool:
    """Whether a torch function, a method of this name or an operator of a library draws random numbers."""
    if isinstance(target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in target.tags
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    packet = target if isinstance(target, torch._ops.OpOverloadPacket) else getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return name == "gumbel_softmax"
    return any(is_random(getattr(packet, overload)) for overload in packet.overloads())  # type: ignore[no-untyped-call]


def is_operator(target: Any) -> bool:
    """Whether a call's target is one of torch.ops: of torch or another library, or one that takes functions."""
    return isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator))


def is_transform(target: Any) -> bool:
    """Whether a call's target enters or leaves torch.vmap or another transform, or works on its tensors."""
    return "functorch" in (getattr(target, "__module__", None) or "")


def in_transform() -> bool:
    """Whether this runs inside of torch.vmap or another transform, whose tensors tell not all of themselves."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def written_arguments(target: Any) -> dict[int, str] | None:
    """Place and name of the arguments that an operator of a library writes to, by its schema; None for what is no such
    operator. Of one that takes functions or kernels nothing is known: all its arguments."""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return dict(enumerate(map(str, range(64)))) if "mutation" in target.name() else {}  # type: ignore[no-untyped-call]
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [getattr(target, one) for one in target.overloads()]  # type: ignore[no-untyped-call]
    elif isinstance(target, torch._ops.OpOverload):
        overloads = [target]
    else:
        return None
    return {
        place: argument.name
        for overload in overloads
        for place, argument in enumerate(overload._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    }
