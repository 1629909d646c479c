"""From a batch of logits to tokens: gathers what each row asks for, runs the steps for those rows, reads back once.

The order is vLLM's: raw log probabilities, allowed ids, bad words, min_tokens, logit bias, repetition, frequency
and presence penalties, temperature, typical_p, min_p, top_k, top_p, draw. vLLM has no typical_p; it comes right
after temperature because its entropy is meant to be the model's own (Meister et al. 2023): after top_k the entropy
would be that of the cut distribution, and the filter would do something else for every k.

Shapes: R rows, S sampled (not greedy) rows, V vocabulary, N (row, token) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from paceline import sizing
from paceline.sampling import steps
from paceline.sampling.logprobs import TokenLogprobs
from paceline.sampling.params import NO_TOKEN_LEFT, SamplingParams
from paceline.sampling.random import uniform
from paceline.sampling.scoring import score_tokens
from paceline.transfer import send

NOT_FINITE = "the model's logits are not finite (NaN or infinity): the weights or the precision overflowed"
NO_TOKEN = -1  # the token id of a row that has an error

# Each filter, the parameter that it takes and when that parameter asks for it; in order.
_FILTERS: tuple[tuple[Callable[[torch.Tensor, Any], torch.Tensor], str, Callable[[Any], bool]], ...] = (
    (steps.filter_typical_p, "typical_p", lambda mass: mass < 1),
    (steps.filter_min_p, "min_p", lambda share: share > 0),
    (steps.filter_top_k, "top_k", lambda k: k > 0),
    (steps.filter_top_p, "top_p", lambda mass: mass < 1),
)


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One token to choose. `position`: its index in the sequence, prompt included; with `seed` it keys the draw.

    `output_token_ids` are all tokens after the prompt and before this one, drafts on the path to it included.
    `stop_token_ids` may not be chosen while the output is shorter than params.min_tokens. Ids must lie inside the
    vocabulary (SamplingParams.check_vocabulary). Histories that penalties read are quickest as array('q') or numpy
    int64: a list of 8,000 ints costs 0.5 ms to convert, a buffer nothing.
    """

    params: SamplingParams
    seed: int
    position: int
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()
    stop_token_ids: frozenset[int] = frozenset()
    bad_words_token_ids: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class Sampled:
    """What was chosen, parallel to the rows: NO_TOKEN where `errors` has the row's message. `logprobs` has the
    rows that asked and did not fail."""

    token_ids: list[int]
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    errors: Mapping[int, str] = field(default_factory=dict)


def sample(logits_RV: torch.Tensor, rows: Sequence[SamplingRow]) -> Sampled:
    """Choose one token a row. `logits_RV`: any float dtype, on any device; not changed.

    A row's token depends on its own logits and SamplingRow alone. A row whose logits hold NaN or +inf, or whose
    masks leave no token, fails alone, in `Sampled.errors`. Reads the device once, and more only for log
    probabilities, typical_p and top_p (which look whether their mass was found) and errors.
    """
    if not rows:
        return Sampled([])
    edited_RV = edit_tokens(logits_RV, rows)
    greedy = [r for r, row in enumerate(rows) if row.params.greedy]
    sampled = [r for r, row in enumerate(rows) if not row.params.greedy]
    parts: list[torch.Tensor] = []
    if greedy:
        parts.append(_argmax(_rows(edited_RV, greedy, len(rows))))
    at_once = sizing.sampled_rows(logits_RV.shape[1])
    for first in range(0, len(sampled), at_once):
        chosen = sampled[first : first + at_once]
        parts.append(_draw(_rows(edited_RV, chosen, len(rows)).float(), [rows[r] for r in chosen]))
    ids, checks = torch.cat(parts, dim=1).tolist()
    token_ids, errors = [NO_TOKEN] * len(rows), {}
    for r, token, check in zip(greedy + sampled, ids, checks, strict=True):
        if check == 1.0:
            token_ids[r] = int(token)
        else:
            errors[r] = why_no_token(logits_RV[r])
    return Sampled(token_ids, _logprobs(logits_RV, rows, token_ids), errors)


# ------------------------------------------------------------------------------------------------- choosing


def _argmax(logits_RV: torch.Tensor) -> torch.Tensor:
    """float64 [2, R]: the likeliest ids (exact: below 2**53), and 1 where they are to be trusted. A NaN is the
    maximum for torch, so that one look at the winner sees it."""
    ids_R1 = logits_RV.argmax(dim=1, keepdim=True)
    fine_R1 = logits_RV.gather(1, ids_R1).isfinite()
    return torch.cat((ids_R1, fine_R1), dim=1).T.to(torch.float64)


def _draw(logits_SV: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """As `_argmax`, for rows that draw. `logits_SV` float32."""
    device = logits_SV.device
    params = [row.params for row in rows]
    if any(p.temperature != 1.0 for p in params):
        logits_SV = steps.apply_temperature(logits_SV, [p.temperature for p in params])
    for filter_rows, name, asks in _FILTERS:
        asking = [s for s, p in enumerate(params) if asks(getattr(p, name))]
        if not asking:
            continue
        values = [getattr(params[s], name) for s in asking]
        filtered = filter_rows(_rows(logits_SV, asking, len(rows)), values)
        if len(asking) == len(rows):
            logits_SV = filtered
        else:
            logits_SV = logits_SV.index_copy(0, torch.tensor(asking, device=device), filtered)
    uniforms = torch.tensor([uniform(row.seed, row.position) for row in rows], dtype=torch.float64, device=device)
    ids_S, total_S = steps.draw(logits_SV.softmax(dim=1), uniforms)
    return torch.stack((ids_S.double(), (total_S > 0).double()))  # NaN > 0 is false


def _rows(logits_RV: torch.Tensor, chosen: list[int], total: int) -> torch.Tensor:
    """The chosen rows; the tensor itself when they are all of them."""
    return logits_RV if len(chosen) == total else logits_RV[chosen]


def why_no_token(logits_V: torch.Tensor) -> str:
    """The message for a row that found no token."""
    if bool((logits_V.isnan() | (logits_V == torch.inf)).any()):
        return NOT_FINITE
    return NO_TOKEN_LEFT


# -------------------------------------------------------------------------------------- masks, bias, penalties


def edit_tokens(logits_RV: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Everything that changes single tokens, on a float32 copy; the logits themselves when no row asks."""
    params = [row.params for row in rows]
    allowed = [(r, p.allowed_token_ids) for r, p in enumerate(params) if p.allowed_token_ids is not None]
    forbidden = [(r, ids) for r, row in enumerate(rows) if (ids := _forbidden_ids(row))]
    biased = [(r, p.logit_bias) for r, p in enumerate(params) if p.logit_bias]
    repeated: list[tuple[int, Sequence[int]]] = []
    counted: list[tuple[int, Sequence[int]]] = []
    for r, row in enumerate(rows):
        if row.params.repetition_penalty != 1:
            repeated += [(r, row.prompt_token_ids), (r, row.output_token_ids)]
        if row.params.frequency_penalty or row.params.presence_penalty:
            counted.append((r, row.output_token_ids))
    if not (allowed or forbidden or biased or repeated or counted):
        return logits_RV

    edited_RV, device = logits_RV.to(torch.float32, copy=True), logits_RV.device
    if allowed:
        steps.allow_only_(edited_RV, *_pairs(allowed, device))
    if forbidden:
        steps.forbid_(edited_RV, *_pairs(forbidden, device))
    if biased:
        values = torch.tensor([bias for _, biases in biased for bias in biases.values()], device=device)
        steps.add_bias_(edited_RV, *_pairs([(r, list(biases)) for r, biases in biased], device), values)
    if repeated:
        penalties = [p.repetition_penalty for p in params]
        steps.penalize_repetition_(edited_RV, *_pairs(repeated, device), penalties)
    if counted:
        frequencies, presences = [p.frequency_penalty for p in params], [p.presence_penalty for p in params]
        steps.penalize_frequency_and_presence_(edited_RV, *_pairs(counted, device), frequencies, presences)
    return edited_RV


def _forbidden_ids(row: SamplingRow) -> list[int]:
    """The ids that bad words and min_tokens forbid here. A bad word's last token is forbidden where the output ends
    with the tokens before it; the prompt does not count, since the word would not lie in the output."""
    output, forbidden = row.output_token_ids, []
    for word in row.bad_words_token_ids:
        start = len(output) - (len(word) - 1)
        if word and start >= 0 and list(output[start:]) == list(word[:-1]):
            forbidden.append(word[-1])
    if len(output) < row.params.min_tokens:
        forbidden.extend(row.stop_token_ids)
    return forbidden


def _pairs(groups: Iterable[tuple[int, Sequence[int]]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """rows_N and ids_N, int64, of (row, its token ids) groups. Through numpy: it reads a buffer such as array('q')
    without a loop, and a list of ints three times as fast as torch.tensor does."""
    numbers = [row for row, _ in groups]
    arrays = [np.asarray(ids, dtype=np.int64) for _, ids in groups]
    rows = np.repeat(np.asarray(numbers, dtype=np.int64), [len(array) for array in arrays])
    return send(rows, device), send(np.concatenate(arrays), device)


# ------------------------------------------------------------------------------------------- log probabilities


def _logprobs(
    logits_RV: torch.Tensor, rows: Sequence[SamplingRow], token_ids: Sequence[int]
) -> dict[int, TokenLogprobs]:
    """The entries of the rows that asked and have a token, by row."""
    wanting = {
        r: num
        for r, row in enumerate(rows)
        if (num := row.params.num_logprobs) is not None and token_ids[r] != NO_TOKEN
    }
    if not wanting:
        return {}
    entries = score_tokens(
        _rows(logits_RV, list(wanting), len(rows)), [token_ids[r] for r in wanting], list(wanting.values())
    )
    return dict(zip(wanting, entries, strict=True))
