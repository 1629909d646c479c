"""Rotary position embedding (Su et al., 2021): the frequencies, and the cosines and sines of a step's positions.

Shapes: T tokens, D rotated dimensions of a head, F = D / 2 frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from paceline.config import RopeConfig, RopeScaling
from paceline.kernels.embed import Angles


def inverse_frequencies(rope: RopeConfig) -> torch.Tensor:
    """theta**(-2i/dim), stretched by `rope.scaling`: float32 [dim / 2], radians a token.

    In float32 and in this order of operations on purpose: the angle is position * frequency, so at position 100,000
    a relative difference of 1e-7 from what the model was trained with would already turn a vector by 0.01 radians.
    """
    scaling = rope.scaling
    if scaling is None:
        return 1.0 / _periods(rope.theta, rope.dim)
    match scaling.kind:
        case "linear":
            return 1.0 / _periods(rope.theta, rope.dim) / scaling.factor
        case "dynamic":
            return 1.0 / _periods(_dynamic_theta(rope, scaling), rope.dim)
        case "yarn":
            return _yarn(rope, scaling)
        case "llama3":
            return _llama3(1.0 / _periods(rope.theta, rope.dim), scaling)
        case "longrope":
            long = (scaling.context or 0) > scaling.original_max_position
            factors_F = torch.tensor(scaling.long_factors if long else scaling.short_factors, dtype=torch.float32)
            return 1.0 / (factors_F * _periods(rope.theta, rope.dim))


def _periods(theta: float, dim: int) -> torch.Tensor:
    """theta**(2i/dim), float32 [dim / 2]: tokens in which a pair turns by one radian."""
    powers_F: torch.Tensor = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return powers_F


def _dynamic_theta(rope: RopeConfig, scaling: RopeScaling) -> float:
    """The base that turns the slowest pair by as much over the context as it was trained to over the original one."""
    stretch = max(scaling.context or 0, scaling.original_max_position) / scaling.original_max_position
    return float(rope.theta * (scaling.factor * stretch - (scaling.factor - 1)) ** (rope.dim / (rope.dim - 2)))


def _yarn(rope: RopeConfig, scaling: RopeScaling) -> torch.Tensor:
    """YaRN's "NTK by parts": pairs that turn more than `beta_fast` times within the original context keep their
    frequency, those that turn less than `beta_slow` times have it divided, linearly blended by index in between."""

    def pair_that_turns(times: float) -> float:
        return rope.dim * math.log(scaling.original_max_position / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low or 0.001  # as the models were trained: two equal ends make a step
    divided_F = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    periods_F = _periods(rope.theta, rope.dim)
    return divided_F / (scaling.factor * periods_F) + (1 - divided_F) / periods_F


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
        frequencies_F = inverse_frequencies(rope)
        self.length = 1.0 if rope.scaling is None else rope.scaling.attention_factor
        # The kernel takes sines whose first half is negated. sin(-a) = -sin(a) exactly, so the sign goes in here.
        # Joined before they move: of tensors without memory, which random weights are named by, torch does it through
        # its compiler, whose import takes 5 s.
        self.signed_D = torch.cat((-frequencies_F, frequencies_F)).to(device)

    @property
    def angles(self) -> Angles:
        """As kernels/embed.py takes them, which computes the same."""
        return Angles(self.signed_D, self.length)

    def forward(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [T] -> (cos, sin) [T, D] as kernels/rotary.py takes them: both halves turn by the same angles, and
        the first half of sin is negated."""
        angles_TD = positions_T[:, None] * self.signed_D
        cos_TD, sin_TD = angles_TD.cos(), angles_TD.sin()
        if self.length != 1.0:
            cos_TD, sin_TD = cos_TD * self.length, sin_TD * self.length
        return cos_TD.to(self.dtype), sin_TD.to(self.dtype)

    def extra_repr(self) -> str:
        return repr(self.rope)
