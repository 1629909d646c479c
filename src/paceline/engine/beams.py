"""Beam search itself: from each beam's likeliest next tokens to the next beams and the finished answers. No torch.

It is the search of Hugging Face transformers 5 (`GenerationMixin._beam_search`), whose answers the tests compare. In
each step the continuations of all beams are ranked by their summed log probability. Those among the `width` best that
end are answers; the best that do not end are the next beams. An answer's score is its sum divided by
length ** length_penalty, where the length counts the generated tokens, the final one included, and not the prompt's.

When the search ends, once `width` answers are found (`early_stopping`):
  True     at once;
  False    when the best beam, scored at its present length, is no better than the worst answer;
  "never"  when it is no better even at the length that would favour it most: the present one where length_penalty <= 0,
           since its sum only falls, else the longest allowed.
At the longest allowed length every beam is an answer. An answer that is found later pushes out the worst.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from paceline.sampling.logprobs import Candidates, TokenLogprobs, penalised
from paceline.sampling.params import SamplingParams


@dataclass(frozen=True)
class Beam:
    """Tokens after the prompt. `logprob`: the sum of what beams compare (after penalties and masks); `raw_logprob`:
    the sum of the model's own log probabilities. `entries`: one a token, where the user asked for log probabilities."""

    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    raw_logprob: float = 0.0
    entries: tuple[TokenLogprobs, ...] = ()

    def extended(self, candidates: Candidates, index: int) -> Beam:
        """This beam and the candidate at `index`."""
        return Beam(
            (*self.token_ids, candidates.token_ids[index]),
            self.logprob + candidates.logprobs[index],
            self.raw_logprob + candidates.raw_logprobs[index],
            (*self.entries, candidates.entries[index]) if candidates.entries else (),
        )


@dataclass(frozen=True)
class BeamAnswer:
    """A finished beam, its last token included, and why it ended."""

    beam: Beam
    score: float
    finish_reason: Literal["stop", "length"]


class BeamSearch:
    """`beams`: the live ones, best first, all of one length. `answers`: finished ones, best first, at most `width`.

    `stop_token_ids` end a beam of at least params.min_tokens tokens; `max_tokens` ends every beam.
    """

    def __init__(self, params: SamplingParams, stop_token_ids: Collection[int], max_tokens: int) -> None:
        self._params = params
        self._stop_token_ids = stop_token_ids
        self._max_tokens = max_tokens
        self._length = 0
        self.beams: list[Beam] = [Beam()]
        self.answers: list[BeamAnswer] = []

    def advance(self, candidates: Sequence[Candidates]) -> list[int]:
        """Take one step, given each beam's candidates in the order of `beams`; return the index that each new beam's
        parent had. No new beam means that the search has ended: all that is to be had is in `answers`.

        Where masks or a tiny vocabulary leave fewer continuations, beams and answers are fewer than `width`.
        """
        width = self._params.width
        self._length += 1
        ranked = sorted(
            (-(beam.logprob + logprob), parent, index)
            for parent, (beam, one) in enumerate(zip(self.beams, candidates, strict=True))
            for index, logprob in enumerate(one.logprobs)
            if logprob > -math.inf
        )
        parents: list[int] = []
        beams: list[Beam] = []
        found: list[BeamAnswer] = []
        for rank, (_, parent, index) in enumerate(ranked):
            reason = self._ends(candidates[parent].token_ids[index])
            if reason is None:
                parents.append(parent)
                beams.append(self.beams[parent].extended(candidates[parent], index))
                if len(beams) == width:
                    break
            elif rank < width:
                beam = self.beams[parent].extended(candidates[parent], index)
                found.append(BeamAnswer(beam, self._score(beam.logprob, self._length), reason))
        self.beams = beams
        self.answers = sorted(self.answers + found, key=lambda answer: -answer.score)[:width]
        if self._is_over():
            self.beams, parents = [], []
        return parents

    def _ends(self, token_id: int) -> Literal["stop", "length"] | None:
        if token_id in self._stop_token_ids and self._length > self._params.min_tokens:
            return "stop"
        return "length" if self._length >= self._max_tokens else None

    def _score(self, logprob: float, length: int) -> float:
        return penalised(logprob, length, self._params.length_penalty)

    def _is_over(self) -> bool:
        params = self._params
        if not self.beams or len(self.answers) < params.width:
            return not self.beams
        if params.early_stopping is True:
            return True
        favourable = params.early_stopping == "never" and params.length_penalty > 0
        best = self._score(self.beams[0].logprob, self._max_tokens if favourable else self._length)
        return best <= self.answers[-1].score
