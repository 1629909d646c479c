"""The sampler of steps that wait for nothing: every parameter lies on the device, one value a row, and no line asks it.

The tokens are those of sampler.py for rows that want temperature, min_p, top_k and top_p at most; what needs a
request's history, or returns log probabilities, is left to it. A CUDA graph can hold each of these functions.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from paceline import sizing
from paceline.kernels.argmax import argmax, argmax_refusal
from paceline.kernels.select import kth_largest, mass_border, select_refusal
from paceline.sampling import steps
from paceline.sampling.params import SamplingParams

Kind = Literal["greedy", "drawn", "filtered"]

TOP_P_OFF = 2.0  # a mass that rounding never reaches: every token stays


@dataclass(frozen=True)
class RowParams:
    """One value a row. Where a row asks for nothing: temperature 1, min_p 0, top_k the vocabulary, top_p TOP_P_OFF."""

    greedy_R: torch.Tensor  # bool
    uniform_R: torch.Tensor  # float64 in [0, 1)
    temperature_R: torch.Tensor  # float32
    min_p_R: torch.Tensor  # float32
    top_k_R: torch.Tensor  # int64, in 1 .. V
    top_p_R: torch.Tensor  # float64


def needs_history(params: SamplingParams) -> bool:
    """Whether a row's token depends on more than its logits and its own numbers, or more than a token is wanted."""
    return (
        params.use_beam_search
        or params.num_logprobs is not None
        or params.typical_p != 1
        or params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or bool(params.logit_bias)
        or params.allowed_token_ids is not None
        or bool(params.bad_words)
    )


def kind_of(params: SamplingParams) -> Kind:
    """The least that serves the row. "filtered" searches every row's vocabulary for borders, or sorts it, and "drawn"
    sums it up."""
    if params.greedy:
        return "greedy"
    return "filtered" if params.min_p > 0 or params.top_k > 0 or params.top_p < 1 else "drawn"


@dataclass(frozen=True)
class Chosen:
    """Where the results go: each row's token, int64, and, float32, a number that is finite where the token can be
    trusted."""

    ids_R: torch.Tensor
    values_R: torch.Tensor


def choose_greedy(logits_RV: torch.Tensor, params: RowParams, out: Chosen) -> None:
    """The likeliest, of equals the first. `logits_RV` float32. The maximum shows every NaN and +inf, as a NaN is the
    maximum for torch."""
    if argmax_refusal(logits_RV) is None:
        argmax(logits_RV, (out.ids_R, out.values_R))
    else:
        torch.max(logits_RV, dim=1, out=(out.values_R, out.ids_R))


def choose_drawn(logits_RV: torch.Tensor, params: RowParams, out: Chosen) -> None:
    """The same for rows of which some draw, and none filters."""
    _draw(logits_RV, logits_RV / params.temperature_R[:, None], params, out)


def choose_filtered(logits_RV: torch.Tensor, params: RowParams, out: Chosen) -> None:
    """The same for any rows."""
    scaled_RV = logits_RV / params.temperature_R[:, None]
    filter_rows = steps.filter_sorted if select_refusal(scaled_RV) else filter_selected
    kept_RV = filter_rows(scaled_RV, params.min_p_R, params.top_k_R, params.top_p_R)
    _draw(logits_RV, kept_RV, params, out)


def filter_selected(
    logits_RV: torch.Tensor, min_p_R: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor
) -> torch.Tensor:
    """steps.filter_sorted without a sort: each border is searched for by counting, and by adding, what lies above."""
    min_p_threshold_R = logits_RV.amax(dim=1) + min_p_R.log()
    threshold_R = torch.maximum(min_p_threshold_R, kth_largest(logits_RV, top_k_R))
    logits_RV = logits_RV.masked_fill(logits_RV < threshold_R[:, None], -torch.inf)
    threshold_R = mass_border(logits_RV, logits_RV.softmax(dim=1), top_p_R)
    return logits_RV.masked_fill(logits_RV < threshold_R[:, None], -torch.inf)


def _draw(logits_RV: torch.Tensor, kept_RV: torch.Tensor, params: RowParams, out: Chosen) -> None:
    choose_greedy(logits_RV, params, out)
    drawn_R, total_R = steps.draw(kept_RV.softmax(dim=1), params.uniform_R)
    torch.where(params.greedy_R, out.ids_R, drawn_R, out=out.ids_R)
    torch.where(params.greedy_R, out.values_R, total_R.to(out.values_R.dtype), out=out.values_R)


Chooser = Callable[[torch.Tensor, RowParams, Chosen], None]


def _by_slices(choose: Chooser) -> Chooser:
    """So many rows at a time as sizing.SAMPLED_VALUES allows."""

    def choose_all(logits_RV: torch.Tensor, params: RowParams, out: Chosen) -> None:
        at_once = sizing.sampled_rows(logits_RV.shape[1])
        for first in range(0, logits_RV.shape[0], at_once):
            rows = slice(first, first + at_once)
            of_rows = RowParams(**{name: values[rows] for name, values in vars(params).items()})
            choose(logits_RV[rows], of_rows, Chosen(out.ids_R[rows], out.values_R[rows]))

    return choose_all


CHOOSERS: Mapping[Kind, Chooser] = MappingProxyType(
    {"greedy": choose_greedy, "drawn": _by_slices(choose_drawn), "filtered": _by_slices(choose_filtered)}
)
KINDS: tuple[Kind, ...] = tuple(CHOOSERS)  # each serves the rows of those before it
