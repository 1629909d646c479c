"""On a CPU a linear runs through oneDNN with its weight laid out once, and takes the activation behind it along.

The packed weight is a copy (kernels/linear.py has its measurements): the model's own stays as it is.
"""

from __future__ import annotations

from torch import fx

from paceline.fusion.graph import argument, call, fake, is_op, only_user, origin, replace
from paceline.fusion.passes.linear import parts
from paceline.fusion.rewrite import Rewrite
from paceline.kernels.linear import onednn_arguments, onednn_operator, onednn_refusal, pack_onednn


def apply(rewrite: Rewrite) -> None:
    for node in list(rewrite.graph.nodes):
        if is_op(node, "linear"):
            _pack(rewrite, node)


def _pack(rewrite: Rewrite, node: fx.Node) -> None:
    known = parts(rewrite, node)
    if known is None or known[1].device.type != "cpu":
        return
    x, weight, _ = known
    refusal = onednn_refusal(tuple(weight.shape), weight.dtype, weight.device)
    if refusal is not None:
        rewrite.leave(f"linear on CPU: {refusal}")
        return
    if not rewrite.is_free(node, x):
        return
    made_of = "onednn", origin(rewrite.module, argument(node, "weight"))
    packed = rewrite.copy(made_of, lambda: pack_onednn(weight.detach()), "packed", node)
    rewrite.copied.append(weight)
    activation, last = _activation_behind(node)
    args = (x, packed, argument(node, "bias"), *onednn_arguments(activation))
    replace(last, call(rewrite.graph, last, onednn_operator(), args, fake(last)))
    rewrite.count("packed linear" if activation == "none" else f"packed linear with {activation}")


def _activation_behind(node: fx.Node) -> tuple[str, fx.Node]:
    user = only_user(node)
    if user is not None:
        if is_op(user, "gelu"):
            return ("gelu_tanh" if argument(user, "approximate", "none") == "tanh" else "gelu"), user
        if is_op(user, "relu"):
            return "relu", user
    return "none", node
