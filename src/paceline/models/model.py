"""What the engine asks of a model: ours (models/decoder.py), or transformers' own modules (models/fallback.py).

Shapes: T tokens of the step, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from paceline.config import KVGroup
from paceline.inputs import KVLayer, ModelInputs
from paceline.kernels.choices import Choice


class Model(Protocol):
    """`vocab_size`: columns of the logits. `kv_groups`: the cache that it needs."""

    dtype: torch.dtype
    device: torch.device

    @property
    def vocab_size(self) -> int: ...

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]: ...

    def choices(self, rows: int) -> Iterable[Choice]:
        """What each part runs in a decode of so many requests, and why nothing better (kernels/choices.py)."""
        ...

    def __call__(self, inputs: ModelInputs, kv: Sequence[KVLayer]) -> torch.Tensor:
        """The hidden states after the final norm, [T, D] in `dtype`. `kv`: one a layer, written in place."""
        ...

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Logits of the given rows, [T, V] float32."""
        ...
