"""Bans do to scores what transformers' processors do."""

from __future__ import annotations

import torch
from transformers import generation

from paceline.fusion.generate.processors import Ban, prepared, processed

VOCAB = 12


def test_bans_are_what_transformers_processors_are() -> None:
    end = torch.tensor([3, 5])
    processors = [
        generation.MinLengthLogitsProcessor(4, end),
        generation.MinNewTokensLengthLogitsProcessor(2, 3, end),
        generation.SuppressTokensLogitsProcessor([0, 7, 7, 99]),
        generation.SuppressTokensAtBeginLogitsProcessor([1, 2], 3),
    ]
    bans = prepared(processors, VOCAB, torch.device("cpu"))
    assert all(isinstance(ban, Ban) for ban in bans)
    for length in range(1, 8):
        tokens = torch.zeros(2, length, dtype=torch.long)
        scores = torch.randn(2, VOCAB)
        for processor, ban in zip(processors, bans, strict=True):
            assert torch.equal(ban(tokens, scores.clone()), processor(tokens, scores.clone())), (processor, length)


def test_scores_that_are_given_stay_as_they_are() -> None:
    """Raw logits are part of a result."""
    scores = torch.zeros(1, VOCAB)
    processors = prepared([generation.SuppressTokensLogitsProcessor([4])], VOCAB, torch.device("cpu"))
    assert processed(processors, torch.zeros(1, 1, dtype=torch.long), scores)[0, 4] == -torch.inf
    assert not scores.any()


def test_another_processor_stays_itself_and_in_its_place() -> None:
    class Mine(generation.MinLengthLogitsProcessor):
        """A subclass may do something else."""

    mine = Mine(4, torch.tensor([3]))
    last = generation.TopKLogitsWarper(2)
    assert prepared([mine, last], VOCAB, torch.device("cpu")) == [mine, last]
