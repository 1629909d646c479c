"""One step of a beam search, of tensors alone: the length that it has reached is one too, so that one CUDA graph serves
all steps. The rules are transformers', to the number: the same scores, penalties, ties and ends.

A step ranks the continuations of all beams of a sentence. Those that end go to the finished ones if they are among the
best K; the best K of the others go on.

Shapes: B sentences, K beams, C continuations ranked a step, R = B * K rows, P prompt, L tokens at most, V vocabulary.
What a beam is lies in one tensor of W = L + (L - P) columns: its tokens, and after them the row that each generated
token came from (-1 where there is none yet), so that beams are moved once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from paceline.fusion.generate.request import Request

NEVER = -1.0e9  # added to the score of what must not be chosen; finite, so that ranks among such stay defined


@dataclass(frozen=True)
class Rules:
    """What stays the same from step to step."""

    beams: int
    prompt: int
    max_length: int
    early_stopping: bool | str
    penalty: float
    sample: bool


def rules_of(request: Request, prompt: int) -> Rules:
    config = request.config
    return Rules(
        request.beams, prompt, request.max_length, config.early_stopping, config.length_penalty, request.sample
    )


class Search(NamedTuple):
    """The beams of all sentences, best first: running ones, and the finished."""

    records_BKW: torch.Tensor  # tokens and origins
    scores_BK: torch.Tensor
    finished_BKW: torch.Tensor
    finished_scores_BK: torch.Tensor
    ended_BK: torch.Tensor  # which of the finished there are
    hopeful_B1: torch.Tensor  # whether a running beam can still beat the finished ones
    length_1: torch.Tensor  # tokens so far, the prompt's too


class Choice(NamedTuple):
    """What a step chose for each running beam, and whether the search is over."""

    tokens_R: torch.Tensor
    parents_R: torch.Tensor
    over: torch.Tensor


class Ranked(NamedTuple):
    """The best continuations of each sentence."""

    records_BCW: torch.Tensor
    scores_BC: torch.Tensor
    ended_BC: torch.Tensor


def begin(rules: Rules, request: Request, prompt_RP: torch.Tensor) -> Search:
    beams, prompt, device = rules.beams, rules.prompt, prompt_RP.device
    sentences, width = prompt_RP.shape[0] // beams, 2 * rules.max_length - prompt
    records_BKW = torch.full((sentences, beams, width), -1, dtype=torch.int64, device=device)
    if request.end_tokens is not None:
        # transformers takes an end token where the pad token is 0, too.
        pad = request.pad_token
        records_BKW[:, :, : rules.max_length] = pad if pad is not None and bool(pad) else request.end_tokens[0]
    records_BKW[:, :, :prompt] = prompt_RP.view(sentences, beams, prompt)
    never_BK = torch.full((sentences, beams), NEVER, device=device)
    return Search(
        records_BKW=records_BKW,
        # All beams of a sentence are alike at first: the first alone may be continued.
        scores_BK=torch.cat((torch.zeros_like(never_BK[:, :1]), never_BK[:, 1:]), dim=1),
        finished_BKW=records_BKW,
        finished_scores_BK=never_BK,
        ended_BK=torch.zeros(sentences, beams, dtype=torch.bool, device=device),
        hopeful_B1=torch.ones(sentences, 1, dtype=torch.bool, device=device),
        length_1=torch.full((1,), prompt, dtype=torch.int64, device=device),
    )


def divisors_of(rules: Rules, device: torch.device) -> torch.Tensor:
    """[L - P]: by what the score of a beam is divided that has one generated token, two, ..."""
    divisors = [float(length**rules.penalty) for length in range(1, rules.max_length - rules.prompt + 1)]
    return torch.tensor(divisors, dtype=torch.float32).to(device)


def advance(
    rules: Rules,
    scores_RV: torch.Tensor,
    end_tokens: torch.Tensor | None,
    divisors_N: torch.Tensor,
    *held: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """The search `held` (the fields of a Search) with one more token, then the fields of a Choice."""
    search = Search(*held)
    ranked = _ranked(rules, search, scores_RV, end_tokens)
    divisor_1 = divisors_N.index_select(0, search.length_1 - rules.prompt)
    merged = _with_ended(rules, search, ranked, divisor_1)
    best_BK = merged.scores_BC.topk(rules.beams).indices
    finished_scores_BK, ended_BK = merged.scores_BC.gather(1, best_BK), merged.ended_BC.gather(1, best_BK)
    scores_BC = _never(ranked.scores_BC, ranked.ended_BC)
    order_BK = scores_BC.topk(rules.beams).indices
    records_BKW, scores_BK = _rows(ranked.records_BCW, order_BK), scores_BC.gather(1, order_BK)
    final_1 = divisors_N[-1:] if rules.early_stopping == "never" and rules.penalty > 0.0 else divisor_1
    hopeful_B1 = search.hopeful_B1 & _better(scores_BK, finished_scores_BK, ended_BK, final_1)
    going_on = hopeful_B1.any() & ~ranked.ended_BC.all()
    if rules.early_stopping is True:
        going_on = going_on & ~ended_BK.all()
    new = Search(
        records_BKW,
        scores_BK,
        _rows(merged.records_BCW, best_BK),
        finished_scores_BK,
        ended_BK,
        hopeful_B1,
        search.length_1 + 1,
    )
    tokens_BK1 = records_BKW.index_select(2, search.length_1)
    parents_BK1 = records_BKW.index_select(2, _origin(rules, search.length_1))
    return *new, *Choice(tokens_BK1.flatten(), parents_BK1.flatten(), ~going_on)


def _ranked(rules: Rules, search: Search, scores_RV: torch.Tensor, end_tokens: torch.Tensor | None) -> Ranked:
    """The C best continuations of each sentence: enough that K of them go on even where every end token is among the
    best."""
    sentences, beams = search.scores_BK.shape
    vocab = scores_RV.shape[1]
    kept = max(2, 1 + (0 if end_tokens is None else len(end_tokens))) * beams
    total_BKV = scores_RV.view(sentences, beams, vocab) + search.scores_BK[:, :, None]
    total_BN = total_BKV.view(sentences, beams * vocab)
    if rules.sample:
        choice_BC = torch.multinomial(total_BN.softmax(dim=-1), num_samples=kept)
        scores_BC = total_BN.gather(1, choice_BC)
    else:
        scores_BC, choice_BC = total_BN.topk(kept)
    parent_BC = choice_BC // vocab
    records_BCW = _rows(search.records_BKW, parent_BC)
    token_BC = choice_BC % vocab
    records_BCW.index_copy_(2, search.length_1, token_BC[:, :, None])
    first_B1 = torch.arange(0, sentences * beams, beams, device=parent_BC.device)[:, None]
    records_BCW.index_copy_(2, _origin(rules, search.length_1), (parent_BC + first_B1)[:, :, None])
    ended_BC = (search.length_1 + 1 == rules.max_length).expand_as(token_BC)
    if end_tokens is not None:
        ended_BC = ended_BC | (token_BC[:, :, None] == end_tokens).any(dim=-1)
    return Ranked(records_BCW, scores_BC, ended_BC)


def _origin(rules: Rules, length_1: torch.Tensor) -> torch.Tensor:
    return length_1 + (rules.max_length - rules.prompt)


def _with_ended(rules: Rules, search: Search, ranked: Ranked, divisor_1: torch.Tensor) -> Ranked:
    """What is finished, and what has just ended among the first K of the ranked."""
    ended_BC = ranked.ended_BC & (torch.arange(ranked.ended_BC.shape[1], device=divisor_1.device) < rules.beams)
    scores_BC = _divided(ranked.scores_BC, divisor_1)
    if rules.early_stopping is True:
        scores_BC = _never(scores_BC, search.ended_BK.all(dim=-1, keepdim=True))
    scores_BC = _never(_never(scores_BC, ~search.hopeful_B1), ~ended_BC)
    return Ranked(
        torch.cat((search.finished_BKW, ranked.records_BCW), dim=1),
        torch.cat((search.finished_scores_BK, scores_BC), dim=1),
        torch.cat((search.ended_BK, ended_BC), dim=1),
    )


def _better(
    scores_BK: torch.Tensor, finished_scores_BK: torch.Tensor, ended_BK: torch.Tensor, final_1: torch.Tensor
) -> torch.Tensor:
    """[B, 1]: whether the best running beam may still come before the worst finished one. Its final length is a guess,
    which `early_stopping="never"` makes safe."""
    best_B1 = _divided(scores_BK[:, :1], final_1)
    worst_BK = torch.where(ended_BK, finished_scores_BK.min(dim=1, keepdim=True).values, NEVER)
    return (best_B1 > worst_BK).any(dim=-1, keepdim=True)


def _never(scores: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    return scores + which.float() * NEVER


def _divided(scores: torch.Tensor, divisor_1: torch.Tensor) -> torch.Tensor:
    """As torch divides by a number, which transformers has it do: on a GPU it multiplies by the inverse."""
    return scores * divisor_1.reciprocal() if scores.is_cuda else scores / divisor_1


def _rows(records_BKW: torch.Tensor, index_BC: torch.Tensor) -> torch.Tensor:
    return records_BKW.gather(1, index_BC[:, :, None].expand(-1, -1, records_BKW.shape[2]))
