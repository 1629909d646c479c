"""What the nodes of a captured graph compute, however they were spelled: `x @ y`, torch.matmul(x, y) and x.matmul(y)
are "matmul" here. A pass asks in these words and never of a spelling.

Graphs are torch.fx graphs as Dynamo makes them: torch functions and methods of tensors, each with a fake tensor of its
result in meta["example_value"], whose sizes may be symbols.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import fx

from paceline.fusion.dynamo import is_operator, is_transform

ALIASES = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "concat": "cat",
    "concatenate": "cat",
    "scaled_dot_product_attention": "sdpa",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "__abs__": "abs",  # what Dynamo makes of abs(), of torch 2.11
}
OPERATORS = {"_operator", "operator", "builtins"}

# The order of arguments, for what passes look into: torch's own functions tell no signature.
PARAMETERS = {
    "linear": ("input", "weight", "bias"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
    "embedding": ("input", "weight", "padding_idx", "max_norm"),
    "embedding_bag": ("input", "weight", "offsets", "max_norm"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "softmax": ("input", "dim", "_stacklevel", "dtype"),
    "dropout": ("input", "p", "training", "inplace"),
    "gelu": ("input", "approximate"),
    "sdpa": ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
    "matmul": ("input", "other"),
    "bmm": ("input", "other"),
    "baddbmm": ("input", "batch1", "batch2", "beta", "alpha"),
    "addmm": ("input", "mat1", "mat2", "beta", "alpha"),
    "add": ("input", "other", "alpha"),
    "sub": ("input", "other", "alpha"),
    "mul": ("input", "other"),
    "div": ("input", "other", "rounding_mode"),
    "pow": ("input", "exponent"),
    "mean": ("input", "dim", "keepdim"),
    "rsqrt": ("input",),
    "sqrt": ("input",),
    "tanh": ("input",),
    "erf": ("input",),
    "sigmoid": ("input",),
    "silu": ("input", "inplace"),
    "relu": ("input", "inplace"),
    "transpose": ("input", "dim0", "dim1"),
    "masked_fill": ("input", "mask", "value"),
    "where": ("condition", "input", "other"),
    "expand": ("input",),
    "unbind": ("input", "dim"),
    "chunk": ("input", "chunks", "dim"),
    "cat": ("tensors", "dim"),
    "gather": ("input", "dim", "index"),
    "getitem": ("input", "index"),
}
SCALAR = (int, float, bool)


def spelled(node: Any) -> str:
    """The name of the torch function or method that a node calls; "" for all else, libraries' operators too."""
    if not isinstance(node, fx.Node):
        return ""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function" or is_operator(node.target) or is_transform(node.target):
        return ""
    module = getattr(node.target, "__module__", None) or ""
    if not (module.split(".")[0] in OPERATORS or module.startswith("torch") or module == ""):
        return ""
    return getattr(node.target, "__name__", "")


def name_of(node: Any) -> str:
    """The operation of a node in one word; "" for what is none: inputs, constants, other functions than torch's. And
    for what lies in memory that the graph changes in place (fusion/effects.py): no pass knows such a value."""
    if isinstance(node, fx.Node) and node.meta.get("touched"):
        return ""
    name = spelled(node)
    return ALIASES.get(name, name)


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The argument of this name, be it given by place or by word."""
    if name in node.kwargs:
        return node.kwargs[name]
    if node.op == "call_method" and name_of(node) == "softmax" and name == "dtype":
        place = 2  # Tensor.softmax knows no _stacklevel
    else:
        place = PARAMETERS[ALIASES.get(spelled(node), spelled(node))].index(name)
    return node.args[place] if place < len(node.args) else default


def is_op(node: Any, *names: str) -> bool:
    return name_of(node) in names


def fake(node: Any) -> Any:
    """The fake tensor (or number, or tuple of them) that stands for the node's value; None where it has none."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def shape_of(node: Any) -> tuple[Any, ...] | None:
    value = fake(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def rank_of(node: Any) -> int | None:
    shape = shape_of(node)
    return None if shape is None else len(shape)


def dtype_of(node: Any) -> torch.dtype | None:
    value = fake(node)
    return value.dtype if isinstance(value, torch.Tensor) else None


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal by their symbols; nothing is assumed and no guard is made of it."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)


def same_shape(a: Any, b: Any) -> bool:
    first, second = shape_of(a), shape_of(b)
    if first is None or second is None or len(first) != len(second):
        return False
    return all(same_size(x, y) for x, y in zip(first, second, strict=True))


def operands(node: fx.Node, name: str) -> tuple[Any, Any] | None:
    """Both operands of `name` ("add", "mul", ...), unless the node is another or scales one of them by alpha."""
    if name_of(node) != name:
        return None
    if name in ("add", "sub") and argument(node, "alpha", 1) != 1:
        return None
    return argument(node, "input"), argument(node, "other")


def tensor_and_scalar(node: Any, name: str) -> tuple[fx.Node, float] | None:
    """The operands of a commutative operation, of which one is a number."""
    pair = operands(node, name) if isinstance(node, fx.Node) else None
    if pair is None:
        return None
    a, b = pair
    if isinstance(a, fx.Node) and isinstance(b, SCALAR):
        return a, float(b)
    if isinstance(b, fx.Node) and isinstance(a, SCALAR) and name in ("add", "mul"):
        return b, float(a)
    return None


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that uses this one, and uses it once; None when there are more, or none."""
    users = list(node.users)
    if len(users) != 1 or sum(1 for used in users[0].all_input_nodes if used is node) != 1:
        return None
    return users[0]


def skip(node: Any, *names: str) -> Any:
    """The first node behind this one that is none of these operations, each of which must have no other user."""
    while is_op(node, *names) and only_user(node) is not None:
        node = node.args[0]
    return node


def is_weight(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def weight_of(graph_module: fx.GraphModule, node: Any) -> torch.Tensor | None:
    """The tensor behind a node that is a constant of the graph; None for every other."""
    if not is_weight(node):
        return None
    value = getattr(graph_module, str(node.target))
    return value if isinstance(value, torch.Tensor) else None


def constant(graph_module: fx.GraphModule, value: Any, hint: str, before: fx.Node) -> fx.Node:
    """A node, placed before another, whose value is this tensor or object."""
    index = sum(1 for name in vars(graph_module) if name.startswith("constant_"))
    name = f"constant_{index}_{hint}"
    # Not as a parameter or buffer: those cost nn.Module's lookup each time that the graph runs.
    vars(graph_module)[name] = value
    with graph_module.graph.inserting_before(before):
        node = graph_module.graph.create_node("get_attr", name)
    if isinstance(value, torch.Tensor):
        node.meta["example_value"] = value
    return node


def stamp(tensor: torch.Tensor) -> tuple[int, int]:
    """What changes when the tensor is written to or gets other memory; one made in inference mode tells no write."""
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()


def origin(graph_module: fx.GraphModule, node: fx.Node) -> Hashable:
    """What a constant was made of: equal for equal values."""
    if "origin" in node.meta:
        found: Hashable = node.meta["origin"]
        return found
    weight = weight_of(graph_module, node)
    assert weight is not None
    return "weight", id(weight), stamp(weight)


def call(graph: fx.Graph, before: fx.Node, function: Any, args: Sequence[Any], value: Any, **kwargs: Any) -> fx.Node:
    """A call of our own placed before a node. `value`: its fake result."""
    with graph.inserting_before(before):
        node = graph.call_function(function, tuple(args), kwargs)
    node.meta["example_value"] = value
    return node


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let every user of `old` use `new`; what nobody uses then is removed with the graph's dead code."""
    old.replace_all_uses_with(new)
    if "example_value" not in new.meta and "example_value" in old.meta:
        new.meta["example_value"] = old.meta["example_value"]
