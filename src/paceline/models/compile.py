"""`mode="compile"`: torch.compile for what no kernel of ours covers: norms and gated activations of many rows.

Products stay where they are: a linear's packed weight is opaque to the compiler, and a product of many rows is the
library's anyway. Everything is compiled here, at load, so that no request waits for it.
"""

from __future__ import annotations

import torch
from torch import nn

from paceline.kernels.elementwise import COMPILED_ROWS, compile_refusal, compiled
from paceline.layers.linear import Linear
from paceline.layers.mlp import GatedMLP
from paceline.layers.norm import Norm


def compile_model(model: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    """Compile `model`'s parts in place; why not, where that failed: it then runs as before."""
    ops = compiled()
    refusal = compile_refusal(ops, _calls(model, dtype, device))
    if refusal is None:
        for module in model.modules():
            if isinstance(module, (Norm, Linear)):
                module.ops = ops
    return refusal


def _calls(model: nn.Module, dtype: torch.dtype, device: torch.device) -> list[tuple[str, tuple[object, ...]]]:
    """One of each kind that the model will make. Sizes are free, so the smallest do."""
    # As the real ones are, or these would be compiled in vain: x made in inference mode, weights outside, no row of x.
    with torch.inference_mode():
        x_TC = torch.ones(COMPILED_ROWS, 32, dtype=dtype, device=device)
    weight_C = torch.ones(32, dtype=dtype, device=device)
    calls: dict[tuple[object, ...], tuple[str, tuple[object, ...]]] = {}
    for module in model.modules():
        if isinstance(module, Norm):
            bias_C = None if module.bias_C is None else weight_C.clone()
            rest = (weight_C, module.eps) if module.kind == "rms" else (weight_C, bias_C, module.eps)
            calls[module.kind, bias_C is None, module.eps] = f"{module.kind}_norm", (x_TC, *rest)
        elif isinstance(module, GatedMLP):
            calls[module.activation,] = "gated", (x_TC, module.activation)
    return list(calls.values())
