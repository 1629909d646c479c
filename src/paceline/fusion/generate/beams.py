"""Beam search, with transformers' rules to the number: the same scores, penalties, ties and ends.

A step ranks the continuations of all beams of a sentence. Those that end go to the finished ones if they are among the
best K; the best K of the others go on. Everything stays on the device; the host reads one flag a step (stopping.py).

Shapes: B sentences, K beams, C continuations ranked a step, R = B * K rows, P prompt, L tokens at most, V vocabulary.
What a beam is lies in one tensor of L + (L - P) columns: its tokens, and after them the row that each generated token
came from (-1 where there is none yet), so that beams are moved once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paceline.fusion.generate.decoder import Decoder
from paceline.fusion.generate.history import History
from paceline.fusion.generate.processors import Processor, processed
from paceline.fusion.generate.request import Request
from paceline.fusion.generate.stopping import StopFlag

NEVER = -1.0e9  # added to the score of what must not be chosen; finite, so that ranks among such stay defined


@dataclass(frozen=True)
class Beams:
    """The beams of all sentences, best first: running ones, and with `ended` the finished."""

    records_BKW: torch.Tensor  # tokens and origins
    scores_BK: torch.Tensor
    ended_BK: torch.Tensor


@dataclass(frozen=True)
class Search:
    running: Beams
    finished: Beams
    hopeful_B1: torch.Tensor  # whether a running beam can still beat the finished ones


def beam_search(
    decoder: Decoder, request: Request, processors: Sequence[Processor], prompt_RP: torch.Tensor
) -> dict[str, object]:
    """`sequences` [B * returned, at most L], `sequences_scores`, `beam_indices`, and `scores` and `logits` a step where
    they are asked for."""
    prompt = length = prompt_RP.shape[1]
    search = _begin(request, prompt_RP)
    before = search
    history = History(request)
    stop = StopFlag(late=request.may_run_on)
    rows_RP = prompt_RP
    logits_RV = decoder.prefill(prompt_RP)
    while True:
        scores_RV = processed(processors, rows_RP, logits_RV.log_softmax(dim=-1))
        history.add(scores_RV, logits_RV)
        before = search
        search, going_on = _advance(search, request, scores_RV, length, prompt)
        length += 1
        decoder.follow(search.running.records_BKW[:, :, request.max_length + length - prompt - 1].flatten())
        stop.tell(~going_on)
        if stop.heard() or length == request.max_length:
            break
        rows_RP = search.running.records_BKW[:, :, :length].flatten(0, 1)
        logits_RV = decoder.step(rows_RP[:, -1])
    surplus = stop.surplus()
    return {**_best((before if surplus else search).finished, request, prompt), **history.result(surplus)}


def _begin(request: Request, prompt_RP: torch.Tensor) -> Search:
    beams, prompt, device = request.beams, prompt_RP.shape[1], prompt_RP.device
    sentences, width = prompt_RP.shape[0] // beams, 2 * request.max_length - prompt
    records_BKW = torch.full((sentences, beams, width), -1, dtype=torch.int64, device=device)
    if request.end_tokens is not None:
        # transformers takes an end token where the pad token is 0, too.
        pad = request.pad_token
        records_BKW[:, :, : request.max_length] = pad if pad is not None and bool(pad) else request.end_tokens[0]
    records_BKW[:, :, :prompt] = prompt_RP.view(sentences, beams, prompt)
    none_BK = torch.zeros(sentences, beams, dtype=torch.bool, device=device)
    never_BK = torch.full((sentences, beams), NEVER, device=device)
    # All beams of a sentence are alike at first: the first alone may be continued.
    first_BK = torch.cat((torch.zeros_like(never_BK[:, :1]), never_BK[:, 1:]), dim=1)
    return Search(
        running=Beams(records_BKW, first_BK, none_BK),
        finished=Beams(records_BKW, never_BK, none_BK),
        hopeful_B1=torch.ones(sentences, 1, dtype=torch.bool, device=device),
    )


def _advance(
    search: Search, request: Request, scores_RV: torch.Tensor, length: int, prompt: int
) -> tuple[Search, torch.Tensor]:
    """The search with one more token, and whether it goes on."""
    ranked = _ranked(search.running, request, scores_RV, length, prompt)
    finished = _with_ended(search, ranked, request, length, prompt)
    scores_BC = ranked.scores_BK + ranked.ended_BK.float() * NEVER
    order_BK = scores_BC.topk(request.beams).indices
    running = _gathered(Beams(ranked.records_BKW, scores_BC, ranked.ended_BK), order_BK)
    hopeful_B1 = _hopeful(search.hopeful_B1, running, finished, request, length + 1, prompt)
    going_on = hopeful_B1.any() & ~ranked.ended_BK.all()
    if request.config.early_stopping is True:
        going_on = going_on & ~finished.ended_BK.all()
    return Search(running, finished, hopeful_B1), going_on


def _ranked(running: Beams, request: Request, scores_RV: torch.Tensor, length: int, prompt: int) -> Beams:
    """The C best continuations of each sentence: enough that K of them go on even where every end token is among the
    best."""
    sentences, beams = running.scores_BK.shape
    vocab = scores_RV.shape[1]
    ends = 0 if request.end_tokens is None else len(request.end_tokens)
    kept = max(2, 1 + ends) * beams
    total_BKV = scores_RV.view(sentences, beams, vocab) + running.scores_BK[:, :, None]
    total_BN = total_BKV.view(sentences, beams * vocab)
    if request.sample:
        choice_BC = torch.multinomial(total_BN.softmax(dim=-1), num_samples=kept)
        scores_BC = total_BN.gather(1, choice_BC)
    else:
        scores_BC, choice_BC = total_BN.topk(kept)
    parent_BC = choice_BC // vocab
    records_BCW = _rows(running.records_BKW, parent_BC)
    token_BC = choice_BC % vocab
    records_BCW[:, :, length] = token_BC
    first_B1 = torch.arange(0, sentences * beams, beams, device=parent_BC.device)[:, None]
    records_BCW[:, :, request.max_length + length - prompt] = parent_BC + first_B1
    if length + 1 == request.max_length:
        ended_BC = torch.ones_like(token_BC, dtype=torch.bool)
    elif request.end_tokens is None:
        ended_BC = torch.zeros_like(token_BC, dtype=torch.bool)
    else:
        ended_BC = torch.isin(token_BC, request.end_tokens)
    return Beams(records_BCW, scores_BC, ended_BC)


def _with_ended(search: Search, ranked: Beams, request: Request, length: int, prompt: int) -> Beams:
    """The best K of what is finished and what has just ended among the first K of the ranked."""
    beams, finished = request.beams, search.finished
    ended_BC = ranked.ended_BK & (torch.arange(ranked.ended_BK.shape[1], device=ranked.ended_BK.device) < beams)
    scores_BC = ranked.scores_BK / ((length + 1 - prompt) ** request.config.length_penalty)
    if request.config.early_stopping is True:
        scores_BC = scores_BC + finished.ended_BK.all(dim=-1, keepdim=True).float() * NEVER
    scores_BC = scores_BC + (~search.hopeful_B1).float() * NEVER
    scores_BC = scores_BC + (~ended_BC).float() * NEVER
    merged = Beams(
        torch.cat((finished.records_BKW, ranked.records_BKW), dim=1),
        torch.cat((finished.scores_BK, scores_BC), dim=1),
        torch.cat((finished.ended_BK, ended_BC), dim=1),
    )
    return _gathered(merged, merged.scores_BK.topk(beams).indices)


def _hopeful(
    hopeful_B1: torch.Tensor, running: Beams, finished: Beams, request: Request, length: int, prompt: int
) -> torch.Tensor:
    """Whether the best running beam may still come before the worst finished one. Its final length is a guess, which
    `early_stopping="never"` makes safe."""
    penalty = request.config.length_penalty
    longest = request.config.early_stopping == "never" and penalty > 0.0
    final = (request.max_length if longest else length) - prompt
    best_B1 = running.scores_BK[:, :1] / (final**penalty)
    worst_BK = torch.where(finished.ended_BK, finished.scores_BK.min(dim=1, keepdim=True).values, NEVER)
    better_B1: torch.Tensor = (best_B1 > worst_BK).any(dim=-1, keepdim=True)
    return hopeful_B1 & better_B1


def _rows(records_BKW: torch.Tensor, index_BC: torch.Tensor) -> torch.Tensor:
    return records_BKW.gather(1, index_BC[:, :, None].expand(-1, -1, records_BKW.shape[2]))


def _gathered(beams: Beams, index_BK: torch.Tensor) -> Beams:
    return Beams(
        _rows(beams.records_BKW, index_BK),
        beams.scores_BK.gather(1, index_BK),
        beams.ended_BK.gather(1, index_BK),
    )


def _best(finished: Beams, request: Request, prompt: int) -> dict[str, object]:
    returned = request.config.num_return_sequences or 1
    records_NW = finished.records_BKW[:, :returned].flatten(0, 1)
    origins_NT = records_NW[:, request.max_length :].to(torch.int32)
    generated = int((origins_NT >= 0).sum(dim=1).max())
    return {
        "sequences": records_NW[:, : prompt + generated].clone(),
        "sequences_scores": finished.scores_BK[:, :returned].flatten() if request.scores else None,
        "beam_indices": origins_NT[:, :generated].clone(),
    }
