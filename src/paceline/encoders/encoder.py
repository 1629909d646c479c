"""A loaded encoder: sequences of tokens in, one row of numbers each out.

Shapes: N sequences in all, B of a batch, L tokens of its longest, D hidden size, V values of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from paceline.encoders.batching import batches
from paceline.encoders.description import EncoderInfo
from paceline.encoders.inputs import Tokens
from paceline.encoders.modules import Pooling
from paceline.encoders.pooling import Dense, pool
from paceline.encoders.results import Rows
from paceline.errors import EngineError
from paceline.transfer import send


@dataclass(frozen=True)
class Encoder:
    """`model`: transformers' module, optimised or not. `pooling` and `dense` make a vector of its hidden states; a
    classifier has logits instead, and None. `takes_types`: it reads which text of a pair a token is of."""

    info: EncoderInfo
    model: Any
    device: torch.device
    dtype: torch.dtype
    pad_token_id: int
    takes_types: bool
    pooling: Pooling | None
    dense: tuple[Dense, ...] = ()

    @torch.inference_mode()
    def run(self, batch: Sequence[Tokens]) -> Rows:
        """The rows of one batch, [B, V]: pooled hidden states, neither normalised nor cut, or logits."""
        lengths = [len(one.ids) for one in batch]
        ids_BL, types_BL = np.full((len(batch), max(lengths)), self.pad_token_id), None
        for row, one in zip(ids_BL, batch, strict=True):
            row[: len(one.ids)] = one.ids
        if self.takes_types:
            types_BL = np.zeros_like(ids_BL)
            for row, one in zip(types_BL, batch, strict=True):
                row[: len(one.type_ids)] = one.type_ids
        lengths_B = send(np.array(lengths), self.device)
        inputs = {
            "input_ids": send(ids_BL, self.device),
            "attention_mask": (torch.arange(max(lengths), device=self.device) < lengths_B[:, None]).long(),
        }
        if types_BL is not None:
            inputs["token_type_ids"] = send(types_BL, self.device)
        output = self.model(**inputs)
        if self.pooling is None:
            rows_BV = output.logits.float()
        else:
            rows_BV = pool(output.last_hidden_state, lengths_B, self.pooling)
            for layer in self.dense:
                rows_BV = layer(rows_BV)
        rows: Rows = rows_BV.cpu().numpy()
        return rows

    def run_all(self, texts: Sequence[Tokens], *, max_tokens: int, max_texts: int) -> Rows:
        """The rows of any number of sequences, [N, V], in their order; in batches of like length within the bounds (see
        `batches`). Raises EngineError where a row is not finite."""
        rows_NV: Rows = np.empty((len(texts), self.info.size), np.float32)
        for batch in batches([len(one.ids) for one in texts], max_tokens, max_texts):
            rows_NV[batch] = self.run([texts[place] for place in batch])
        broken = np.flatnonzero(~np.isfinite(rows_NV).all(-1))
        if broken.size:
            raise not_finite(self, int(broken[0]))
        return rows_NV


def not_finite(encoder: Encoder, place: int) -> EngineError:
    dtype = str(encoder.dtype).removeprefix("torch.")
    return EngineError(f"the model's values for text {place} are not finite in {dtype}: try dtype 'float32'")
