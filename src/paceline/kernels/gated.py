"""Gated activation (Shazeer, 2020) of many rows as one Triton kernel, for CUDA where `gated_refusal` finds nothing
against it. The plain twin, kernels/activation.py: gated, is two, and moves 10 bytes a 16-bit output where this one
moves 6.

Shapes: T tokens, C channels.
"""

from __future__ import annotations

import torch

from paceline.kernels.epilogue import epilogue_refusal, finish_product, launch_epilogue
from paceline.kernels.gemv import Epilogue
from paceline.kernels.scaled_linear import ScaledRows, empty_rows, quantize_rows

MOST_CHANNELS = 16384  # of a program with a row in registers: 32 a thread in 16 warps


def gated_refusal(gate_up_TC: torch.Tensor) -> str | None:
    """Why gated_rows cannot take such rows; None when it can."""
    return epilogue_refusal(gate_up_TC)


def gated_rows(gate_up_TC: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up, [T, C / 2], for [gate, up] side by side; computed in float32 and rounded once.

    On compute capability 9.0 and up it starts while the kernel before it on the stream still runs, and waits for that
    one's end before it reads or writes.
    """
    return finish_product(gate_up_TC, Epilogue(activation=activation, gated=True))


def scaled_gated_rows(gate_up_TC: torch.Tensor, activation: str) -> ScaledRows:
    """quantize_rows of gated_rows, in the same kernel up to MOST_CHANNELS."""
    import triton

    tokens, channels = gate_up_TC.shape[0], gate_up_TC.shape[1] // 2
    if channels > MOST_CHANNELS:
        return quantize_rows(gated_rows(gate_up_TC, activation))
    y = empty_rows(tokens, channels, gate_up_TC.device)
    block = triton.next_power_of_2(channels)
    epilogue, warps = Epilogue(activation=activation, gated=True), max(1, min(16, block // 512))
    launch_epilogue(gate_up_TC, y.q_TK, epilogue, block, warps=warps, scale_T1=y.scale_T1)
    return y
