"""Gated activation (Shazeer, 2020) of many rows as one Triton kernel, for CUDA where `gated_refusal` finds nothing
against it. The plain twin, kernels/activation.py: gated, is two, and moves 10 bytes a 16-bit output where this one
moves 6.

Shapes: T tokens, C channels.
"""

from __future__ import annotations

import torch

from paceline.kernels.gpu import gpu, launch_options, triton_refusal

BLOCK = 2048  # channels of a program


def gated_refusal(gate_up_TC: torch.Tensor) -> str | None:
    """Why gated_rows cannot take such rows; None when it can."""
    if gate_up_TC.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype is {gate_up_TC.dtype}"
    if gate_up_TC.dim() != 2 or gate_up_TC.stride(1) != 1:
        return "they are no matrix of whole rows"
    return triton_refusal(gate_up_TC.device, gate_up_TC.dtype)


def gated_rows(gate_up_TC: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up, [T, C / 2], for [gate, up] side by side; computed in float32 and rounded once.

    On compute capability 9.0 and up it starts while the kernel before it on the stream still runs, and waits for that
    one's end before it reads or writes.
    """
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    from paceline.kernels.gated_triton import gate

    tokens, channels = gate_up_TC.shape[0], gate_up_TC.shape[1] // 2
    y_TC = gate_up_TC.new_empty(tokens, channels)
    if y_TC.numel() == 0:
        return y_TC
    dependent = gpu(gate_up_TC.device).dependent
    # Tokens come first: the other axes of a grid end at 65,535.
    gate[(tokens, -(-channels // BLOCK))](
        gate_up_TC,
        y_TC,
        gate_up_TC.stride(0),
        C=channels,
        BLOCK=BLOCK,
        ACTIVATION=activation,
        DEPENDENT=dependent,
        num_warps=8,
        **launch_options(dependent),
    )
    return y_TC
