"""How one stream is measured, alike for every engine.

An engine is a function: a prompt and a number of tokens in, that many tokens out, on the host, greedily. Each round
times it for 1, FIRST and LAST tokens: the first is the time to the first token, and the difference of the others is
that of the tokens from FIRST to LAST, whatever an engine does before, after or ahead.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from paceline.errors import EngineError

PROMPT = 32  # tokens
FIRST, LAST = 16, 144
DECODED = LAST - FIRST

Generate = Callable[[Sequence[int], int], Sequence[int]]


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of each round, for prompts of `context` tokens."""

    context: int
    first_token: tuple[float, ...]
    decode: tuple[float, ...]  # of DECODED tokens

    @property
    def ttft(self) -> float:
        return median(self.first_token)

    @property
    def tokens_per_second(self) -> float:
        return DECODED / median(self.decode)


def random_prompt(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Token ids above the first hundred, where special tokens tend to be."""
    draw = random.Random(seed)
    return [draw.randrange(min(100, vocab_size // 2), vocab_size) for _ in range(length)]


def measure(
    generate: Generate, prompt: Sequence[int], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> Timing:
    """Time `rounds` rounds after a first that is thrown away, the longest answer first: what an engine allocates or
    compiles for it serves the shorter ones. Raises EngineError where an answer has another length than asked."""

    def timed(num_tokens: int) -> float:
        start = clock()
        answer = generate(prompt, num_tokens)
        seconds = clock() - start
        if len(answer) != num_tokens:
            raise EngineError(f"asked for {num_tokens} tokens and got {len(answer)}: nothing can be measured")
        return seconds

    for num_tokens in (LAST, FIRST, 1):
        timed(num_tokens)
    found = [(timed(1), timed(FIRST), timed(LAST)) for _ in range(rounds)]
    return Timing(len(prompt), tuple(first for first, _, _ in found), tuple(long - short for _, short, long in found))
