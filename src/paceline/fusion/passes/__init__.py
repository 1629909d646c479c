"""The passes, in the order in which they run. Each is a file with `apply`: what it looks for, what it puts there, why.

The first ones only clean: what does nothing, what is known, what is computed twice. Then the spellings of one thing
become that thing; then things are joined; the last ones choose how each runs on the device at hand.
"""

from paceline.fusion.graph import touched_in_place
from paceline.fusion.passes import (
    activations,
    attention,
    common,
    constants,
    cpu_attention,
    cpu_linear,
    linear,
    no_ops,
    norms,
    qkv,
)
from paceline.fusion.rewrite import Rewrite

PASSES = (
    no_ops.apply,
    constants.apply,
    common.apply,
    norms.apply,
    activations.apply,
    linear.apply,
    attention.apply,
    qkv.apply,
    cpu_attention.apply,
    cpu_linear.apply,
)


def run_passes(rewrite: Rewrite) -> None:
    """All of them over the graph, in place."""
    for apply in PASSES:
        rewrite.touched = touched_in_place(rewrite.graph)
        apply(rewrite)
        rewrite.graph.eliminate_dead_code()
    rewrite.graph.lint()
    rewrite.module.recompile()
