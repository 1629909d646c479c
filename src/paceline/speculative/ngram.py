"""Prompt lookup (Saxena, 2023): what followed the same n-gram earlier in the context is the draft. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paceline.config import SpeculativeConfig


class NgramIndex:
    """One request's n-grams, so that a proposal costs the same at 100 tokens as at 100,000.

    For each length min..max it maps an n-gram to the position after its most recent occurrence that is followed by at
    least one token. `extend` costs (max - min + 1) dict writes a token; a naive search costs O(context) a step.
    """

    def __init__(self, config: SpeculativeConfig, token_ids: Iterable[int] = ()) -> None:
        self._config = config
        self._lengths = range(config.prompt_lookup_max, config.prompt_lookup_min - 1, -1)
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self.extend(token_ids)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Take in tokens that are certain: the prompt, then what each step accepted."""
        tokens, ends = self._tokens, self._ends
        for token in token_ids:
            end = len(tokens)
            for length in self._lengths:  # the n-grams that end before `token` now have a follower
                if length <= end:
                    ends[tuple(tokens[end - length : end])] = end
            tokens.append(token)

    def propose(self) -> tuple[int, ...]:
        """At most num_speculative_tokens ids that followed the longest known suffix; () if none was seen before."""
        for length in self._lengths:
            if length > len(self._tokens):
                continue
            end = self._ends.get(tuple(self._tokens[-length:]))
            if end is not None:
                return tuple(self._tokens[end : end + self._config.num_speculative_tokens])
        return ()


def propose(token_ids: Sequence[int], config: SpeculativeConfig) -> tuple[int, ...]:
    """NgramIndex.propose by plain search, O(context): the definition that the index is tested against."""
    total = len(token_ids)
    for length in range(config.prompt_lookup_max, config.prompt_lookup_min - 1, -1):
        suffix = list(token_ids[total - length :])
        for start in range(total - length - 1, -1, -1):
            if list(token_ids[start : start + length]) == suffix:
                end = start + length
                return tuple(token_ids[end : end + config.num_speculative_tokens])
    return ()
