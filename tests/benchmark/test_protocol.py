"""The protocol, with a clock of our own and an engine that moves it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from paceline.benchmark.protocol import DECODED, FIRST, LAST, Timing, measure, random_prompt
from paceline.errors import EngineError


class Engine:
    """Takes `prefill` seconds, then `steps[n]` for each further token of its n-th call (the last for all after)."""

    def __init__(self, prefill: float, steps: Sequence[float], missing: int = 0) -> None:
        self.now, self.prefill, self.steps, self.missing = 1000.0, prefill, list(steps), missing
        self.asked: list[int] = []

    def generate(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        step = self.steps[min(len(self.asked), len(self.steps) - 1)]
        self.asked.append(num_tokens)
        self.now += self.prefill + (num_tokens - 1) * step
        return [0] * (num_tokens - self.missing)

    def clock(self) -> float:
        return self.now


def test_the_rate_is_that_of_tokens_16_to_144():
    engine = Engine(prefill=0.5, steps=[0.01])
    timing = measure(engine.generate, [1] * 32, 3, engine.clock)
    assert (FIRST, LAST, DECODED) == (16, 144, 128)
    assert timing.context == 32
    assert timing.ttft == pytest.approx(0.5)  # neither prefill nor the first tokens are in the rate
    assert timing.tokens_per_second == pytest.approx(100)
    assert timing.decode == pytest.approx((1.28,) * 3)


def test_the_first_round_is_thrown_away_and_asks_for_the_longest_first():
    engine = Engine(prefill=0.5, steps=[9.0, 9.0, 9.0, 0.01])
    timing = measure(engine.generate, [1], 2, engine.clock)
    assert engine.asked == [LAST, FIRST, 1, *(1, FIRST, LAST) * 2]
    assert timing.tokens_per_second == pytest.approx(100)


def test_figures_are_medians():
    timing = Timing(32, (0.2, 0.1, 9.0), (1.28, 12.8, 0.64))
    assert timing.ttft == 0.2
    assert timing.tokens_per_second == pytest.approx(100)


@pytest.mark.parametrize("missing", [1, -1])
def test_an_answer_of_another_length_is_no_figure(missing):
    engine = Engine(prefill=0.5, steps=[0.01], missing=missing)
    with pytest.raises(EngineError, match=f"asked for 144 tokens and got {144 - missing}"):
        measure(engine.generate, [1], 1, engine.clock)


def test_prompts():
    assert len(random_prompt(32, 1000)) == 32
    assert random_prompt(32, 1000) == random_prompt(32, 1000) != random_prompt(32, 1000, seed=1)
    assert all(100 <= token < 1000 for token in random_prompt(1000, 1000))
    assert all(5 <= token < 10 for token in random_prompt(1000, 10))
