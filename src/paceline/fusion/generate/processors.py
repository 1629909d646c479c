"""What is done to the scores of a step before tokens are chosen.

transformers' processors are called as they are, but for those that ban a fixed set of tokens: they look the whole
vocabulary up in the set at every step, also at steps where they ban nothing.

Shapes: R rows, N tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paceline.fusion.generate.transformers_names import generation

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (tokens [R, N], scores [R, V]) -> scores


@dataclass(frozen=True)
class Ban:
    """-inf for the tokens `banned`, booleans [V], at the steps at which `holds` of the number of tokens so far."""

    banned_V: torch.Tensor
    holds: Callable[[int], bool]

    def __call__(self, tokens_RN: torch.Tensor, scores_RV: torch.Tensor) -> torch.Tensor:
        if not self.holds(tokens_RN.shape[1]):
            return scores_RV
        return scores_RV.masked_fill(self.banned_V, -torch.inf)


def prepared(processors: Sequence[Any], vocab_size: int, device: torch.device) -> list[Processor]:
    """The processors in their order, with a `Ban` for each that is one."""
    result: list[Processor] = []
    for processor in processors:
        found = _banned(processor)
        if found is None:
            result.append(processor)
            continue
        tokens, holds = found
        banned_V = torch.zeros(vocab_size, dtype=torch.bool)
        banned_V[tokens[tokens < vocab_size].cpu()] = True
        result.append(Ban(banned_V.to(device), holds))
    return result


def _banned(processor: Any) -> tuple[torch.Tensor, Callable[[int], bool]] | None:
    """The tokens that a processor bans, and when; None of one that does something else."""
    kind = type(processor)
    if kind is generation.MinLengthLogitsProcessor:
        return processor.eos_token_id, lambda length: length < processor.min_length
    if kind is generation.MinNewTokensLengthLogitsProcessor:
        least = processor.prompt_length_to_skip + processor.min_new_tokens
        return processor.eos_token_id, lambda length: length < least
    if kind is generation.SuppressTokensLogitsProcessor:
        return processor.suppress_tokens, lambda length: True
    if kind is generation.SuppressTokensAtBeginLogitsProcessor:
        return processor.begin_suppress_tokens, lambda length: length == processor.begin_index
    return None


def processed(processors: Sequence[Processor], tokens_RN: torch.Tensor, scores_RV: torch.Tensor) -> torch.Tensor:
    for processor in processors:
        scores_RV = processor(tokens_RN, scores_RV)
    return scores_RV
