"""From an encoder's raw rows to what users get: normalised or shortened embeddings, scores, probabilities. No torch:
a server's API process does this.

Shapes: N texts, D values a row; all float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paceline.encoders.description import EncoderInfo
from paceline.errors import UsageError

Rows = NDArray[np.float32]

SMALLEST = 1e-12  # a length below it is taken as this: the zero vector stays what it is


def embeddings(
    rows_ND: Rows, info: EncoderInfo, *, dimensions: int | None = None, normalize: bool | None = None
) -> Rows:
    """Embeddings, [N, dimensions]: the first `dimensions` of each (Matryoshka; Kusupati et al., 2022), then of length 1
    if `normalize`; None does as the checkpoint says. Raises UsageError for dimensions that there are not."""
    check_embeds(info, dimensions)
    if dimensions is not None:
        rows_ND = rows_ND[:, :dimensions]
    return _unit(rows_ND) if (info.normalize if normalize is None else normalize) else np.ascontiguousarray(rows_ND)


def probabilities(rows_ND: Rows, info: EncoderInfo) -> Rows:
    """What `info.activation` makes of a classifier's logits, [N, D]."""
    check_classifies(info)
    return _activated(rows_ND, info)


def cross_scores(rows_N1: Rows, info: EncoderInfo) -> list[float]:
    """A cross-encoder's scores of pairs."""
    scores: list[float] = _activated(rows_N1, info)[:, 0].tolist()
    return scores


def cosines(ones_ND: Rows, others_ND: Rows) -> list[float]:
    """The cosine of each row with the one beside it; of a single row with all others."""
    similarities: list[float] = (_unit(ones_ND) * _unit(others_ND)).sum(-1).tolist()
    return similarities


def best_first(scores: Sequence[float], top_n: int | None) -> list[int]:
    """Places of the `top_n` highest scores, None for all; of equals the first one first. Raises UsageError."""
    check_top_n(top_n)
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:top_n]


def check_top_n(top_n: int | None) -> None:
    if top_n is not None and top_n < 1:
        raise UsageError(f"top_n must be at least 1, got {top_n}")


def check_embeds(info: EncoderInfo, dimensions: int | None = None) -> None:
    if info.task != "embed":
        raise UsageError(f"{info.architecture} classifies and has no embeddings: use classify{_or_score(info)}")
    if dimensions is not None and not 1 <= dimensions <= info.size:
        raise UsageError(f"dimensions must be from 1 to {info.size}, got {dimensions}")


def check_classifies(info: EncoderInfo) -> None:
    if info.task != "classify":
        raise UsageError(f"{info.architecture} embeds texts and has no classes: use embed, score or rerank")


def check_scores(info: EncoderInfo) -> None:
    if info.task == "classify" and not info.is_cross_encoder:
        raise UsageError(f"{info.architecture} has {info.size} classes, where a score needs a single one: use classify")


def _or_score(info: EncoderInfo) -> str:
    return ", score or rerank" if info.is_cross_encoder else ""


def _unit(rows_ND: Rows) -> Rows:
    lengths_N1 = np.linalg.norm(rows_ND, axis=-1, keepdims=True)
    unit_ND: Rows = rows_ND / np.maximum(lengths_N1, SMALLEST)
    return unit_ND


def _activated(rows_ND: Rows, info: EncoderInfo) -> Rows:
    if info.activation == "identity":
        return rows_ND
    if info.activation == "sigmoid":
        # Of the negative absolute value: exp of a large number would overflow.
        small_ND = np.exp(-np.abs(rows_ND))
        sigmoid_ND: Rows = np.where(rows_ND >= 0, 1, small_ND) / (1 + small_ND)
        return sigmoid_ND
    powers_ND = np.exp(rows_ND - rows_ND.max(-1, keepdims=True))
    softmax_ND: Rows = powers_ND / powers_ND.sum(-1, keepdims=True)
    return softmax_ND
