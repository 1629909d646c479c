"""Rotary position embedding (Su et al., 2021): the frequencies, and the cosines and sines of a step's positions.

Shapes: T tokens, D rotated dimensions of a head, F = D / 2 frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from paceline.config import RopeConfig, RopeScaling


def inverse_frequencies(rope: RopeConfig) -> torch.Tensor:
    """theta**(-2i/dim), stretched by `rope.scaling`: float32 [dim / 2], radians a token.

    In float32 and in this order of operations on purpose: the angle is position * frequency, so at position 100,000
    a relative difference of 1e-7 from what the model was trained with would already turn a vector by 0.01 radians.
    """
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    frequencies_F = 1.0 / (rope.theta**exponents)
    if rope.scaling is None:
        return frequencies_F
    if rope.scaling.kind == "linear":
        return frequencies_F / rope.scaling.factor
    return _llama3(frequencies_F, rope.scaling)


def _llama3(frequencies_F: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1's rule: divide by `factor` the frequencies that turn fewer than `low_freq_factor` times within the
    original context, keep those that turn more than `high_freq_factor` times, and blend linearly in between."""
    turns_F = scaling.original_max_position / (2 * math.pi / frequencies_F)
    keep_F = (turns_F - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep_F = keep_F.clamp(0.0, 1.0)
    return (1 - keep_F) * frequencies_F / scaling.factor + keep_F * frequencies_F


class Rotary(nn.Module):
    """The cosines and sines of a step's positions, computed once a step and shared by every layer of this RopeConfig.

    Computed, not looked up: a table takes as many operations, 134 MB for a context of 131,072 and heads of 128, and
    bounds the position. The angles are float32; `dtype` is that of the queries and keys they turn.
    """

    def __init__(self, rope: RopeConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.rope = rope
        self.dtype = dtype
        frequencies_F = inverse_frequencies(rope).to(device)
        # The kernel takes sines whose first half is negated. sin(-a) = -sin(a) exactly, so the sign goes in here.
        self.signed_D = torch.cat((-frequencies_F, frequencies_F))

    def forward(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [T] -> (cos, sin) [T, D] as kernels/rotary.py takes them: both halves turn by the same angles, and
        the first half of sin is negated."""
        angles_TD = positions_T[:, None] * self.signed_D
        return angles_TD.cos().to(self.dtype), angles_TD.sin().to(self.dtype)

    def extra_repr(self) -> str:
        return repr(self.rope)
