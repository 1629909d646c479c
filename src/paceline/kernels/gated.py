"""Gated activation (Shazeer, 2020) of many rows as one Triton kernel, for CUDA where `gated_refusal` finds nothing
against it. The plain twin, kernels/activation.py: gated, is two, and moves 10 bytes a 16-bit output where this one
moves 6.

Shapes: T tokens, C channels.
"""

from __future__ import annotations

import torch

from paceline.kernels.gpu import gpu, launch_options, triton_refusal
from paceline.kernels.scaled_linear import ScaledRows, empty_rows, quantize_rows

BLOCK = 2048  # channels of a program
MOST_CHANNELS = 16384  # of a program with a row in registers: 32 a thread in 16 warps


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
    y_TC = gate_up_TC.new_empty(gate_up_TC.shape[0], gate_up_TC.shape[1] // 2)
    _launch(gate_up_TC, y_TC, None, activation, BLOCK, warps=8)
    return y_TC


def scaled_gated_rows(gate_up_TC: torch.Tensor, activation: str) -> ScaledRows:
    """quantize_rows of gated_rows, in the same kernel up to MOST_CHANNELS."""
    import triton

    tokens, channels = gate_up_TC.shape[0], gate_up_TC.shape[1] // 2
    if channels > MOST_CHANNELS:
        return quantize_rows(gated_rows(gate_up_TC, activation))
    y = empty_rows(tokens, channels, gate_up_TC.device)
    block = triton.next_power_of_2(channels)
    _launch(gate_up_TC, *y, activation, block, warps=max(1, min(16, block // 512)))
    return y


def _launch(
    gate_up_TC: torch.Tensor,
    y_TC: torch.Tensor,
    scale_T1: torch.Tensor | None,
    activation: str,
    block: int,
    *,
    warps: int,
) -> None:
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    from paceline.kernels.gated_triton import gate

    if y_TC.numel() == 0:
        return
    tokens, channels = y_TC.shape
    dependent = gpu(gate_up_TC.device).dependent
    # Tokens come first: the other axes of a grid end at 65,535.
    gate[(tokens, -(-channels // block))](
        gate_up_TC,
        y_TC,
        scale_T1,
        gate_up_TC.stride(0),
        C=channels,
        BLOCK=block,
        ACTIVATION=activation,
        DEPENDENT=dependent,
        num_warps=warps,
        **launch_options(dependent),
    )
