"""Weight rules: which tensors of a checkpoint, stacked along dimension 0, make one of our parameters.

A family's table is a tuple of rules; "{i}" stands for the layer. Most rules rename; the others fuse, as
WeightRule("layers.{i}.attention.qkv.weight", ("model.layers.{i}.self_attn.q_proj.weight", ...k..., ...v...)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightRule:
    """`ours` is the concatenation of `theirs` along dimension 0. Both hold "{i}" or neither does."""

    ours: str
    theirs: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.theirs or len({"{i}" in name for name in (self.ours, *self.theirs)}) != 1:
            raise ValueError(
                f"weight rule for {self.ours!r}: all names hold '{{i}}' or none does, and there is at least one"
            )


def forward_names(rules: Sequence[WeightRule], num_layers: int) -> dict[str, tuple[str, ...]]:
    """Our name -> the checkpoint's names, for every layer. Raises ValueError if two rules make the same parameter."""
    names: dict[str, tuple[str, ...]] = {}
    for rule in rules:
        for layer in range(num_layers) if "{i}" in rule.ours else (0,):
            ours = rule.ours.replace("{i}", str(layer))
            if ours in names:
                raise ValueError(f"two weight rules make {ours!r}")
            names[ours] = tuple(theirs.replace("{i}", str(layer)) for theirs in rule.theirs)
    return names


def inverse(names: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, int]]:
    """The checkpoint's name -> (our name, which part of it). Raises ValueError if a tensor is used twice."""
    parts: dict[str, tuple[str, int]] = {}
    for ours, theirs in names.items():
        for part, name in enumerate(theirs):
            if name in parts:
                raise ValueError(f"checkpoint tensor {name!r} is used by {parts[name][0]!r} and by {ours!r}")
            parts[name] = (ours, part)
    return parts
