"""From a batch of logits to the candidates of beams: the likeliest next tokens of each row and what they add.

Masks, bias and penalties come from sampler.edit_tokens, but upon log probabilities instead of logits, as transformers
applies them in beam search: a repetition penalty of 2 doubles a seen token's negative log probability.

Shapes: R rows (one a beam), C rows with as many candidates, K candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.sampling.logprobs import Candidates, TokenLogprobs, num_candidates
from paceline.sampling.sampler import SamplingRow, edit_tokens, why_no_token
from paceline.sampling.scoring import score_tokens


def find_candidates(logits_RV: torch.Tensor, rows: Sequence[SamplingRow]) -> list[Candidates | str]:
    """Each row's `num_candidates` best next tokens, or the message of a row whose logits are not finite.

    `logits_RV`: any float dtype, on any device; not changed. A row depends on its own logits and SamplingRow alone:
    one topk for each distinct K, because how topk orders tied tokens depends on its K.
    """
    raw_RV = logits_RV.float().log_softmax(dim=1)
    edited_RV = edit_tokens(raw_RV, rows)
    by_num: dict[int, list[int]] = {}
    for r, row in enumerate(rows):
        num = min(num_candidates(row.params.width, len(row.stop_token_ids)), logits_RV.shape[1])
        by_num.setdefault(num, []).append(r)
    found: list[Candidates | str] = [""] * len(rows)
    for num, chosen in by_num.items():
        top_CK = edited_RV[chosen].topk(num, dim=1)
        raw_CK = raw_RV[chosen].gather(1, top_CK.indices)
        lists = zip(top_CK.indices.tolist(), top_CK.values.tolist(), raw_CK.tolist(), strict=True)
        for r, (ids, values, raw) in zip(chosen, lists, strict=True):
            if raw[0] != raw[0]:  # a NaN or +inf anywhere in the logits makes every log probability NaN
                found[r] = why_no_token(logits_RV[r])
                continue
            left = sum(value > -torch.inf for value in values)
            entries = _entries(logits_RV[r], ids[:left], rows[r].params.logprobs)
            found[r] = Candidates(tuple(ids[:left]), tuple(values[:left]), tuple(raw[:left]), entries)
    return found


def _entries(logits_V: torch.Tensor, token_ids: list[int], num_top: int | None) -> tuple[TokenLogprobs, ...]:
    """What each candidate would tell a user who asked for `num_top` log probabilities."""
    if num_top is None or not token_ids:
        return ()
    return tuple(score_tokens(logits_V.expand(len(token_ids), -1), token_ids, [num_top] * len(token_ids)))
