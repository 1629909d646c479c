"""GELU by its formulas, and SiLU as x * sigmoid(x), become torch's own: eight passes over the widest tensor of a layer
become one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.nn import functional as F

from paceline.fusion.graph import argument, call, fake, is_op, operands, replace, tensor_and_scalar
from paceline.fusion.rewrite import Rewrite
from paceline.kernels.activation import quick_gelu

QUICK = 1.702  # quick_gelu's


def apply(rewrite: Rewrite) -> None:
    for node in list(rewrite.graph.nodes):
        for name, match, function, keywords in SPELLINGS:
            x = match(node)
            if x is not None and rewrite.is_free(node, x):
                replace(node, call(rewrite.graph, node, function, (x,), fake(node), **keywords))
                rewrite.count(name)
                break


def _gelu_tanh(node: fx.Node) -> fx.Node | None:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the factors in any order, x taken out or not."""
    factors, number = _product(node)
    if len(factors) != 2 or not _close(number, 0.5):
        return None
    for x, other in (factors, factors[::-1]):
        inner = _plus_one(other)
        if inner is None or not is_op(inner, "tanh"):
            continue
        scaled, number = _product(argument(inner, "input"))
        apart = x in scaled  # x (1 + c x^2), else x + c x^3
        sums = [factor for factor in scaled if factor is not x]
        if not _close(number, math.sqrt(2 / math.pi)) or len(sums) != 1 or len(scaled) != 1 + apart:
            continue
        pair = operands(sums[0], "add")
        for a, b in (pair, pair[::-1]) if pair else ():
            if (a == 1 if apart else a is x) and _is_power(b, x, 2 if apart else 3, 0.044715):
                return x
    return None


def _gelu_erf(node: fx.Node) -> fx.Node | None:
    """0.5 x (1 + erf(x / sqrt(2)))."""
    factors, number = _product(node)
    if len(factors) != 2 or not _close(number, 0.5):
        return None
    for x, other in (factors, factors[::-1]):
        inner = _plus_one(other)
        if inner is not None and is_op(inner, "erf"):
            scaled = _only_product(argument(inner, "input"))
            if scaled is not None and scaled[0] is x and _close(scaled[1], 1 / math.sqrt(2)):
                return x
    return None


def _silu(node: fx.Node) -> fx.Node | None:
    return _gated_by_sigmoid(node, 1.0)


def _quick_gelu(node: fx.Node) -> fx.Node | None:
    return _gated_by_sigmoid(node, QUICK)


def _gated_by_sigmoid(node: fx.Node, slope: float) -> fx.Node | None:
    factors, number = _product(node)
    if len(factors) != 2 or number != 1:
        return None
    for x, other in (factors, factors[::-1]):
        if is_op(other, "sigmoid"):
            scaled = _only_product(argument(other, "input"))
            if scaled is not None and scaled[0] is x and _close(scaled[1], slope):
                return x
    return None


SPELLINGS: tuple[tuple[str, Callable[[fx.Node], fx.Node | None], Callable[..., Any], dict[str, Any]], ...] = (
    ("gelu", _gelu_tanh, F.gelu, {"approximate": "tanh"}),
    ("gelu", _gelu_erf, F.gelu, {}),
    ("silu", _silu, F.silu, {}),
    ("quick gelu", _quick_gelu, quick_gelu, {}),
)


def _product(node: Any) -> tuple[list[fx.Node], float]:
    """The factors of a product of tensors, and the product of its numbers. A factor that others use stays whole."""
    factors: list[fx.Node] = []
    number = 1.0
    todo = [(node, True)]
    while todo:
        current, outermost = todo.pop()
        if isinstance(current, (int, float)):
            number *= current
            continue
        if outermost or (isinstance(current, fx.Node) and len(current.users) == 1):
            if is_op(current, "mul"):
                todo.extend((part, False) for part in reversed(operands(current, "mul") or ()))
                continue
            divided = tensor_and_scalar(current, "div")
            if divided is not None:
                number /= divided[1]
                todo.append((divided[0], False))
                continue
        factors.append(current)
    return factors, number


def _only_product(node: Any) -> tuple[fx.Node, float] | None:
    """One tensor times a number; the number is 1 for a tensor alone."""
    scaled = tensor_and_scalar(node, "mul")
    if scaled is not None:
        return scaled
    divided = tensor_and_scalar(node, "div")
    if divided is not None:
        return divided[0], 1 / divided[1]
    return (node, 1.0) if isinstance(node, fx.Node) else None


def _plus_one(node: Any) -> fx.Node | None:
    pair = tensor_and_scalar(node, "add")
    return pair[0] if pair is not None and pair[1] == 1 else None


def _is_power(node: Any, x: fx.Node, exponent: int, scale: float) -> bool:
    """Whether it is scale * x^exponent."""
    factors, number = _product(node)
    found = 0
    for factor in factors:
        if factor is x:
            found += 1
        elif is_op(factor, "pow") and argument(factor, "input") is x:
            found += argument(factor, "exponent")
        else:
            return False
    return found == exponent and _close(number, scale)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4)
