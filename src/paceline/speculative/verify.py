"""The lossless verifier for drafts proposed with certainty (n-gram lookup, a greedy draft model).

The target model computes in one step the distribution p_i after each prefix of the drafts, and one token x_i is
sampled from each, with the uniform number of its own position (sampling.random). Drafts are accepted while
draft_i == x_i; the first x_i that differs is emitted in the draft's place; when all are accepted the last x_i, past
the drafts, is emitted too.

Why it is lossless, twice over:

- It is the rejection rule of Leviathan et al. 2023 and Chen et al. 2023, accept d ~ q with probability
  min(1, p(d) / q(d)) or else draw from norm(max(p - q, 0)), for a q that holds all its mass on one token d.
  There q(d) = 1, so d is accepted with probability p(d): that is P(x == d). And a rejection draws from p with d
  taken out, renormalised: that is the law of x given x != d. So the emitted token has law p at every position.
- It emits the very tokens that no speculation would, seed by seed, not merely their law. x_i is a function of p_i
  and of (seed, position i), and it is looked at only if every draft before it was accepted, that is if p_i was
  computed after exactly the tokens that were emitted. By induction over i, without drafts x_i is the same.

Both need p_i to be the final distribution: after penalties and min_tokens as of *this* path, temperature and filters.
`rows_with_drafts` sees to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from paceline.sampling.sampler import SamplingRow


def rows_with_drafts(row: SamplingRow, drafts: Sequence[int]) -> list[SamplingRow]:
    """The 1 + len(drafts) rows of a request: `row` itself, then one row after each draft, whose output holds the
    drafts so far and whose position is one further."""
    output = row.output_token_ids
    return [row] + [
        replace(row, position=row.position + i, output_token_ids=[*output, *drafts[:i]])
        for i in range(1, len(drafts) + 1)
    ]


def verify(drafts: Sequence[int], sampled: Sequence[int]) -> tuple[int, ...]:
    """The tokens to emit: the accepted drafts, then one more; len - 1 is the number accepted.

    `sampled`: the token chosen in each of the 1 + len(drafts) rows. A row that failed (sampler.NO_TOKEN) equals no
    draft: it ends the result if the path reaches it, and if not it never mattered.
    """
    if len(sampled) != len(drafts) + 1:
        raise ValueError(f"{len(drafts)} drafts need {len(drafts) + 1} sampled tokens, got {len(sampled)}")
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == sampled[accepted]:
        accepted += 1
    return tuple(sampled[: accepted + 1])
