"""Beam search: the loop around its steps (beam_step.py). Everything stays on the device; the host reads one flag a step
(stopping.py).

Shapes: B sentences, K beams, R = B * K rows, P prompt, L tokens at most, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.fusion.cuda_graphs import Function
from paceline.fusion.generate.beam_step import Choice, Search, begin, divisors_of, rules_of
from paceline.fusion.generate.decoder import Decoder
from paceline.fusion.generate.history import History
from paceline.fusion.generate.processors import Processor, processed
from paceline.fusion.generate.request import Request
from paceline.fusion.generate.stopping import StopFlag


def beam_search(
    decoder: Decoder, request: Request, processors: Sequence[Processor], prompt_RP: torch.Tensor, step: Function
) -> dict[str, object]:
    """`sequences` [B * returned, at most L], `sequences_scores`, `beam_indices`, and `scores` and `logits` a step where
    they are asked for. `step`: beam_step.py: advance, or what runs it."""
    prompt = length = prompt_RP.shape[1]
    rules = rules_of(request, prompt)
    divisors_N = divisors_of(rules, prompt_RP.device)
    search = begin(rules, request, prompt_RP)
    history = History(request)
    stop = StopFlag(late=request.may_run_on)
    rows_RP = prompt_RP
    logits_RV = decoder.prefill(prompt_RP)
    while True:
        scores_RV = processed(processors, rows_RP, logits_RV.log_softmax(dim=-1))
        history.add(scores_RV, logits_RV)
        before = search
        made = step(rules, scores_RV, request.end_tokens, divisors_N, *search)
        search, chosen = Search(*made[: len(search)]), Choice(*made[len(search) :])
        length += 1
        decoder.follow(chosen.parents_R)
        stop.tell(chosen.over)
        if stop.heard() or length == request.max_length:
            break
        rows_RP = search.records_BKW[:, :, :length].flatten(0, 1)
        logits_RV = decoder.step(chosen.tokens_R)
    surplus = stop.surplus()
    return {**_best(before if surplus else search, request, prompt), **history.result(surplus)}


def _best(search: Search, request: Request, prompt: int) -> dict[str, object]:
    returned = request.config.num_return_sequences or 1
    records_NW = search.finished_BKW[:, :returned].flatten(0, 1)
    origins_NT = records_NW[:, request.max_length :].to(torch.int32)
    generated = int((origins_NT >= 0).sum(dim=1).max())
    return {
        "sequences": records_NW[:, : prompt + generated].clone(),
        "sequences_scores": search.finished_scores_BK[:, :returned].flatten() if request.scores else None,
        "beam_indices": origins_NT[:, :generated].clone(),
    }
