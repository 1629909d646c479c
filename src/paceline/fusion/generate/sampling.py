"""Greedy decoding and sampling: a token a row and step, until each row has ended.

Shapes: R rows, P prompt, L tokens at most, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.fusion.generate.decoder import Decoder
from paceline.fusion.generate.history import History
from paceline.fusion.generate.processors import Processor, processed
from paceline.fusion.generate.request import Request
from paceline.fusion.generate.stopping import StopFlag


def sample(
    decoder: Decoder, request: Request, processors: Sequence[Processor], prompt_RP: torch.Tensor
) -> dict[str, object]:
    """`sequences` [R, at most L], `scores` and `logits` a step where they are asked for."""
    rows, length = prompt_RP.shape
    tokens_RL = prompt_RP.new_empty(rows, request.max_length)
    tokens_RL[:, :length] = prompt_RP
    running_R = torch.ones(rows, dtype=torch.bool, device=prompt_RP.device)
    history = History(request)
    stop = StopFlag(late=request.may_run_on)
    logits_RV = decoder.prefill(prompt_RP)
    while True:
        scores_RV = processed(processors, tokens_RL[:, :length], logits_RV)
        history.add(scores_RV, logits_RV)
        if request.sample:
            chosen_R = torch.multinomial(scores_RV.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            chosen_R = scores_RV.argmax(dim=-1)
        if request.end_tokens is not None:
            assert request.pad_token is not None  # `generate` takes the first end token where there is none
            chosen_R = torch.where(running_R, chosen_R, request.pad_token)
            running_R = running_R & (chosen_R[:, None] != request.end_tokens).all(dim=-1)
        tokens_RL[:, length] = chosen_R
        length += 1
        stop.tell(~running_R.any())
        if stop.heard() or length == request.max_length:
            break
        logits_RV = decoder.step(chosen_R)
    surplus = stop.surplus()
    return {"sequences": tokens_RL[:, : length - surplus].clone(), **history.result(surplus)}
