"""What many streams are asked: seeded prompts and lengths, the same for every engine. No torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from paceline.benchmark.protocol import random_prompt
from paceline.errors import UsageError

SHORTEST = 4  # tokens of a drawn length
LONGEST = 4  # times the mean
SIGMA = 0.8  # of the normal distribution of a length's logarithm; conversations' lengths spread about as far


@dataclass(frozen=True)
class Workload:
    """`num_requests` requests that come at once, of `input_len` tokens and `output_len` to be made, on average where
    the lengths are `mixed`: log-normal, between SHORTEST and LONGEST times the mean. `prefix`: tokens before them that
    are the same for all the requests of each of `groups` groups."""

    num_requests: int = 256
    input_len: int = 512
    output_len: int = 256
    mixed: bool = False
    prefix: int = 0
    groups: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_requests", "input_len", "output_len", "groups"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', ' ')} must be at least 1, got {getattr(self, name)}")
        if self.prefix < 0:
            raise UsageError(f"a prefix has 0 tokens or more, got {self.prefix}")

    @property
    def longest(self) -> int:
        """Tokens of the longest request that it can hold, prompt and answer."""
        most = LONGEST if self.mixed else 1
        return self.prefix + most * (self.input_len + self.output_len)


@dataclass(frozen=True)
class Ask:
    """A request: its prompt, and how many tokens are made."""

    prompt: Sequence[int]
    num_tokens: int


def draw_asks(workload: Workload, vocab_size: int, round_index: int = 0) -> list[Ask]:
    """The requests of one round. The lengths are those of every round; the tokens are not, so that no round finds
    another's prompts in a prefix cache."""
    lengths = random.Random(workload.seed)
    seeds = random.Random(f"{workload.seed} {round_index}")
    prefixes = [random_prompt(workload.prefix, vocab_size, seeds.getrandbits(32)) for _ in range(workload.groups)]
    return [
        Ask(
            prefixes[index % workload.groups]
            + random_prompt(_length(lengths, workload.input_len, workload), vocab_size, seeds.getrandbits(32)),
            _length(lengths, workload.output_len, workload),
        )
        for index in range(workload.num_requests)
    ]


def _length(draw: random.Random, mean: int, workload: Workload) -> int:
    if not workload.mixed:
        return mean
    # exp(sigma^2 / 2) is the mean of the log-normal distribution whose median is 1.
    factor = draw.lognormvariate(-SIGMA * SIGMA / 2, SIGMA)
    return min(max(SHORTEST, round(mean * factor)), LONGEST * mean)
