"""What stands between a layer's products: norms before them, activations after. Plain, or through torch.compile.

A compiled function costs 20 us of host time a call and makes one pass of several: on a CPU it pays from some 256 rows
on (one thread, bfloat16, SmolLM2-135M: 256 rows normed in 114 us against 145, 1,024 rows gated in 1.16 ms against
2.14). Fewer rows stay plain. By these figures a prompt of 512 or 2,048 tokens gains 1 to 3%, which measuring whole
prompts could not tell from noise.

Shapes: T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Concatenate, ParamSpec

import torch

from paceline.kernels.activation import activate, gated
from paceline.kernels.norm import layer_norm, rms_norm

COMPILED_ROWS = 256

P = ParamSpec("P")


@dataclass(frozen=True)
class Elementwise:
    """Each as its namesake in kernels/norm.py and kernels/activation.py."""

    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] = rms_norm
    layer_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor] = layer_norm
    gated: Callable[[torch.Tensor, str], torch.Tensor] = gated
    activate: Callable[[torch.Tensor, str], torch.Tensor] = activate


PLAIN = Elementwise()


def compiled() -> Elementwise:
    """The same through torch.compile, from COMPILED_ROWS rows on; whatever their number, they compile once."""
    return Elementwise(*(_large_compiled(plain) for plain in (rms_norm, layer_norm, gated)))


def _large_compiled(plain: Callable[Concatenate[torch.Tensor, P], torch.Tensor]) -> Callable[..., torch.Tensor]:
    fused: Callable[Concatenate[torch.Tensor, P], torch.Tensor] = torch.compile(plain, dynamic=True)

    def call(x_TC: torch.Tensor, *args: P.args, **kwargs: P.kwargs) -> torch.Tensor:
        return (fused if x_TC.shape[0] >= COMPILED_ROWS else plain)(x_TC, *args, **kwargs)

    return call


def compile_refusal(ops: Elementwise, calls: Sequence[tuple[str, tuple[object, ...]]]) -> str | None:
    """Why torch.compile does not work here, found by trying: each of `calls` names a function of `ops` and gives its
    arguments. A missing C++ compiler and an error of its own raise something else each. None where it works."""
    try:
        with torch.inference_mode():
            for name, arguments in calls:
                getattr(ops, name)(*arguments)
    except Exception as error:  # whatever a compiler raises
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    return None
