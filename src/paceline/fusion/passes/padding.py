"""At level "fast" nothing is computed at padding: tokens are packed together where their way through the layers begins,
and put back where it ends, with zeros between. Between the two, each operation treats each token by itself, but for
attention, which is handed the padded form.

That attention gives padding no weight is not seen from the graph: CapturedGraph tries it, with other masks than the
caller's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from paceline.fusion.cpu_heads import attend_joined, attend_joined_packed
from paceline.fusion.dynamo import likely_size, parameter_of
from paceline.fusion.gpu_linear import product_norm, sum_norm
from paceline.fusion.graph import argument, call, fake, is_op, name_of, rank_of, same_size, shape_of
from paceline.fusion.heads import attend, attend_by_kernel, attend_packed, attend_packed_by_kernel
from paceline.fusion.packing import pack, packing, unpack
from paceline.fusion.rewrite import Rewrite
from paceline.fusion.rotary import rotate_heads, rotate_heads_by_kernel

BY_ITSELF = ("linear", "layer_norm", "gelu", "silu", "relu", "tanh", "sigmoid", "to", "dropout")
# What attends, its form for packed tokens, and how many tensors of tokens come first; behind them is the mask.
OF_PACKED: dict[Any, tuple[Callable[..., torch.Tensor], int]] = {
    attend: (attend_packed, 3),
    attend_by_kernel: (attend_packed_by_kernel, 3),
    attend_joined: (attend_joined_packed, 1),
}
# Which return several tensors of tokens.
PAIRS = (torch.split, product_norm, sum_norm, rotate_heads, rotate_heads_by_kernel)
BY_PAIRS = ("add", "sub", "mul", "div")


def apply(rewrite: Rewrite, of_tokens: frozenset[Callable[..., Any]]) -> bool:
    """`of_tokens`: functions, put in by other passes, that treat each row by itself. Returns whether anything was done;
    then the graph has one input more, the last: count_tokens of the mask."""
    mask = attention_mask(rewrite)
    if mask is None:
        return False
    first = next((node for node in rewrite.graph.nodes if _is_self_attention(node, mask)), None)
    if first is None:
        return False
    shape = (shape_of(first.args[0]) or ())[:2]
    region = _region(rewrite, mask, shape, of_tokens)
    if not any(node.target in OF_PACKED for node in region):
        return False
    start, entry = next(
        (node, source)
        for node in region
        for source in node.all_input_nodes
        if source not in region and _is_of_tokens(source, shape)
    )
    last_input = [node for node in rewrite.graph.nodes if node.op == "placeholder"][-1]
    with rewrite.graph.inserting_after(last_input):
        rows = rewrite.graph.placeholder("rows")
    packed = call(rewrite.graph, start, packing, (mask, entry, rows), None)
    entered: dict[fx.Node, fx.Node] = {}
    for node in region:
        for source in node.all_input_nodes:
            if source not in region and source not in entered and _is_of_tokens(source, shape):
                entered[source] = call(rewrite.graph, node, pack, (source, packed), fake(source))
    for node in list(region):
        outside = [user for user in node.users if user not in region]
        if node.target in OF_PACKED:
            tokens = _tokens_of_attention(node)
            node.target = OF_PACKED[node.target][0]
            node.args = (*(entered.get(arg, arg) for arg in tokens), *node.args[len(tokens) :], packed)
        else:
            node.args = fx.map_arg(node.args, lambda source: entered.get(source, source))
        if outside and _is_of_tokens(node, shape):
            back = call(rewrite.graph, node.next, unpack, (node, packed), fake(node))
            for user in outside:
                user.replace_input_with(node, back)
    rewrite.count("padding left out")
    return True


def attention_mask(rewrite: Rewrite) -> fx.Node | None:
    """The input that is true for tokens and false for padding, by its name and form."""
    for node in rewrite.graph.nodes:
        if node.op != "placeholder" or parameter_of(str(node.target), rewrite.parameters) != "attention_mask":
            continue
        value = fake(node)
        if isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point():
            return None if value.shape[0] == 1 else node
    return None


def _is_self_attention(node: fx.Node, mask: fx.Node) -> bool:
    """Of a batch of the mask's form, as the captured inputs have it."""
    if node.target not in OF_PACKED:
        return False
    shapes = [shape_of(arg) for arg in _tokens_of_attention(node)]
    expected = shape_of(mask)
    if any(shape is None or len(shape) != 3 for shape in shapes) or expected is None:
        return False
    first, *others = (shape[:2] for shape in shapes if shape is not None)
    same = all(same_size(a, b) for other in others for a, b in zip(first, other, strict=True))
    return same and list(map(likely_size, first)) == list(map(likely_size, expected))


def _may_be_tried(node: fx.Node, mask: fx.Node) -> bool:
    """Whether an attention that gives padding weight would be found out. What CapturedGraph masks is the texts' end,
    which causal attention never sees from before it."""
    attn_mask, heads = node.args[len(_tokens_of_attention(node)) :][:2]
    if not heads.causal:  # type: ignore[union-attr]
        return True
    return isinstance(attn_mask, fx.Node) and _inputs_of(attn_mask) == {mask}


def _inputs_of(node: fx.Node) -> set[fx.Node]:
    """The tensors of the caller's that a node is made of."""
    seen, ahead = {node}, [node]
    while ahead:
        ahead = [source for one in ahead for source in one.all_input_nodes if source not in seen]
        seen.update(ahead)
    return {one for one in seen if one.op == "placeholder" and isinstance(fake(one), torch.Tensor)}


def _tokens_of_attention(node: fx.Node) -> tuple[Any, ...]:
    return node.args[: OF_PACKED[node.target][1]]


def _region(
    rewrite: Rewrite, mask: fx.Node, shape: tuple[Any, ...], of_tokens: frozenset[Callable[..., Any]]
) -> dict[fx.Node, None]:
    """The nodes that treat each token by itself, in order."""
    region: dict[fx.Node, None] = {}
    for node in rewrite.graph.nodes:
        if not rewrite.is_free(node, *node.all_input_nodes) or not _is_by_itself(node, shape, of_tokens, region):
            continue
        if node.target not in OF_PACKED or _may_be_tried(node, mask):
            region[node] = None
    # What splits a tensor of tokens has no shape of its own to go by: with nobody behind it in the region it goes.
    for node in reversed(list(region)):
        if not _is_of_tokens(node, shape) and any(user not in region for user in node.users):
            del region[node]
    return region


def _is_by_itself(
    node: fx.Node, shape: tuple[Any, ...], of_tokens: frozenset[Callable[..., Any]], region: dict[fx.Node, None]
) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in PAIRS:
        over_channels = node.target is not torch.split or node.args[2] == -1
        return bool(over_channels) and _are_of_tokens(node, shape)
    if is_op(node, "chunk"):
        return argument(node, "dim", 0) in (-1, 2) and _is_of_tokens(node.args[0], shape)
    if node.target is operator.getitem and node.args[0] in region and isinstance(node.args[1], int):
        return True
    if not _is_of_tokens(node, shape):
        return False
    if node.target in OF_PACKED:
        return all(_is_of_tokens(arg, shape) for arg in _tokens_of_attention(node))
    if node.target in of_tokens or is_op(node, *BY_ITSELF):
        return _are_of_tokens(node, shape) and not (
            is_op(node, "layer_norm") and len(argument(node, "normalized_shape")) != 1
        )
    if name_of(node) in BY_PAIRS:
        return all(
            not isinstance(arg, fx.Node) or _is_of_tokens(arg, shape) or _is_of_channels(arg) for arg in node.args[:2]
        )
    return False


def _are_of_tokens(node: fx.Node, shape: tuple[Any, ...]) -> bool:
    """Whether a node's inputs are tensors of tokens, the first of them at least, and weights."""
    first, *others = node.all_input_nodes or (None,)
    return _is_of_tokens(first, shape) and all(
        source.op == "get_attr" or _is_of_tokens(source, shape) for source in others
    )


def _is_of_tokens(node: Any, shape: tuple[Any, ...]) -> bool:
    """Whether it is [batch, tokens, channels]."""
    found = shape_of(node)
    return found is not None and len(found) == 3 and all(same_size(a, b) for a, b in zip(found[:2], shape, strict=True))


def _is_of_channels(node: fx.Node) -> bool:
    return node.op == "get_attr" and rank_of(node) == 1
