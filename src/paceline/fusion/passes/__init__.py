"""The passes, in the order in which they run. Each is a file with `apply`: what it looks for, what it puts there, why.

The first ones only clean: what does nothing, what is known, what is computed twice. Then the spellings of one thing
become that thing; then things are joined; the last ones choose how each runs on the device at hand.
"""

from collections.abc import Callable
from typing import Any

from paceline.fusion.effects import has_effect, mark_touched
from paceline.fusion.gpu_linear import product, product_only_normed
from paceline.fusion.passes import (
    activations,
    attention,
    common,
    compile_rest,
    constants,
    cpu_attention,
    cpu_heads,
    cpu_linear,
    gpu_attention,
    gpu_linear,
    heads,
    in_place,
    linear,
    masks,
    no_ops,
    norms,
    padding,
    positions,
    qkv,
    quantized,
    rotary,
)
from paceline.fusion.rewrite import Rewrite
from paceline.kernels.activation import quick_gelu
from paceline.kernels.linear import onednn_operators
from paceline.kernels.norm import rms_norm

PASSES = (
    in_place.apply,
    no_ops.apply,
    constants.apply,
    positions.apply,
    common.apply,
    norms.apply,
    activations.apply,
    linear.apply,
    attention.apply,
    qkv.apply,
    masks.apply,
    common.apply,
    cpu_attention.apply,
    rotary.apply,
    heads.apply,
    quantized.apply,
    gpu_attention.apply,
    gpu_linear.apply,
    cpu_heads.apply,
    cpu_linear.apply,
)
# What is left to torch.compile comes behind all else, behind padding too: within a part no pass finds anything.
STAGES = (*PASSES, compile_rest.apply)

# Functions that passes put in and that treat each row by itself.
OF_TOKENS: frozenset[Callable[..., Any]] = frozenset(
    {rms_norm, quick_gelu, quantized.product, product, product_only_normed, *onednn_operators()}
)


def run_passes(rewrite: Rewrite, count: int = len(PASSES)) -> None:
    """The first `count` of the stages over the graph, in place; all passes, if it is not given."""
    for apply in STAGES[:count]:
        _run(apply, rewrite)
    _finish(rewrite)


def leave_out_padding(rewrite: Rewrite) -> bool:
    """The pass of level "fast", which is tried by itself (capture.py); whether it found anything to do."""
    mark_touched(rewrite.graph)
    done = padding.apply(rewrite, OF_TOKENS)
    _finish(rewrite)
    return done


def compile_what_is_left(rewrite: Rewrite) -> None:
    """The stage of `compile_rest`, which is tried by itself (capture.py)."""
    _run(compile_rest.apply, rewrite)
    _finish(rewrite)


def _run(apply: Callable[[Rewrite], None], rewrite: Rewrite) -> None:
    mark_touched(rewrite.graph)
    apply(rewrite)
    rewrite.graph.eliminate_dead_code(has_effect)


def _finish(rewrite: Rewrite) -> None:
    used = {str(node.target) for node in rewrite.graph.nodes if node.op == "get_attr"}
    for name in [name for name in vars(rewrite.module) if name.startswith("constant_") and name not in used]:
        del vars(rewrite.module)[name]  # the weights of which a packed copy is left
    rewrite.graph.lint()
    rewrite.module.recompile()
