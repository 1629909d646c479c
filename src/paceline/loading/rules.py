"""Weight rules: which tensors of a checkpoint, stacked along dimension 0, make one of our parameters.

A family's table is a tuple of rules; "{i}" stands for the layer and "{e}" for the expert. Most rules rename; others
fuse, as WeightRule("blocks.{i}.attention.qkv.weight", ("model.layers.{i}.self_attn.q_proj.weight", ...k..., ...v...)),
or name one tensor that is stored fused already, in our order of rows or in another (`Layout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """How a stored tensor differs from ours, [rows, ...].

    `transposed`: it is stored as [columns, rows] (GPT-2). `kv_groups` (K, G): the rows of q, k and v lie by key head,
    G query heads, then the key, then the value, K times over (GPT-NeoX and BLOOM with G = 1, Falcon); ours are all
    queries, all keys, all values.
    """

    transposed: bool = False
    kv_groups: tuple[int, int] | None = None

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1] if self.transposed else shape

    def ours(self, stored: torch.Tensor) -> torch.Tensor:
        """The values in our order, maybe a view."""
        values = stored.T if self.transposed and stored.dim() == 2 else stored
        if self.kv_groups is None:
            return values
        kv_heads, queries = self.kv_groups
        heads = values.reshape(kv_heads, queries + 2, -1, *values.shape[1:])
        return torch.cat([part.flatten(0, 2) for part in (heads[:, :queries], heads[:, -2:-1], heads[:, -1:])])


PLAIN = Layout()


@dataclass(frozen=True)
class WeightRule:
    """`ours` is the concatenation of `theirs` along dimension 0. All names hold "{i}" or none does; so for "{e}".
    `layers`: those that the rule is for, None for all."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = PLAIN
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for index in ("{i}", "{e}"):
            if not self.theirs or len({index in name for name in (self.ours, *self.theirs)}) != 1:
                raise ValueError(
                    f"weight rule for {self.ours!r}: all names hold '{index}' or none does, and there is at least one"
                )


@dataclass(frozen=True)
class Stored:
    """Where a parameter's values are: the checkpoint's names and their layout."""

    names: tuple[str, ...]
    layout: Layout = PLAIN


def stored_names(rules: Sequence[WeightRule], num_layers: int, num_experts: int = 0) -> dict[str, Stored]:
    """Our name -> where it is stored, for every layer and expert. ValueError if two rules make the same parameter."""
    found: dict[str, Stored] = {}
    for rule in rules:
        layers = range(num_layers) if rule.layers is None else rule.layers
        for i in layers if "{i}" in rule.ours else (0,):
            for e in range(num_experts) if "{e}" in rule.ours else (0,):
                ours, *theirs = (
                    name.replace("{i}", str(i)).replace("{e}", str(e)) for name in (rule.ours, *rule.theirs)
                )
                if ours in found:
                    raise ValueError(f"two weight rules make {ours!r}")
                found[ours] = Stored(tuple(theirs), rule.layout)
    return found
