"""What a round's outcomes come to: latencies by percentile, rates, and goodput. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from paceline.errors import UsageError

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Outcome:
    """One request. Seconds since its round's start: `due`, when it was to be sent; `sent`; `times`, when each chunk
    with text came. `counted`: whether the server told `output_tokens`. `error`: why there is no whole answer.

    Latencies count from `due`: a client that is late must not make the server look quick.
    """

    due: float
    sent: float
    times: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    output_tokens: int = 0
    counted: bool = False
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        return self.times[0] - self.due if self.times else None

    @property
    def latency(self) -> float | None:
        return self.times[-1] - self.due if self.times else None

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None for one token."""
        if not self.times or self.output_tokens < 2:
            return None
        return (self.times[-1] - self.times[0]) / (self.output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        """Between two chunks with text, which are two tokens unless the server puts several into a chunk."""
        return [later - earlier for earlier, later in pairwise(self.times)]


@dataclass(frozen=True)
class Slo:
    """Seconds that a good answer takes at most; None: any."""

    ttft: float | None = None
    tpot: float | None = None
    latency: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """From "ttft:500 tpot:50 e2el:10000", in milliseconds, as vLLM's benchmark has it. Raises UsageError."""
        names = {"ttft": "ttft", "tpot": "tpot", "e2el": "latency"}
        bounds: dict[str, float] = {}
        for part in text.replace(",", " ").split():
            name, _, number = part.partition(":")
            try:
                value = float(number)
            except ValueError:
                value = math.nan
            if name not in names or not value > 0:
                raise UsageError(f"--goodput '{part}' must be ttft, tpot or e2el, and milliseconds, as in ttft:500")
            bounds[names[name]] = value / 1e3
        if not bounds:
            raise UsageError("--goodput is empty: give bounds, as in 'ttft:500 tpot:50'")
        return cls(**bounds)

    def holds(self, outcome: Outcome) -> bool:
        if outcome.error is not None:
            return False
        pairs = [(outcome.ttft, self.ttft), (outcome.tpot, self.tpot), (outcome.latency, self.latency)]
        return all(bound is None or value is None or value <= bound for value, bound in pairs)


@dataclass(frozen=True)
class Round:
    """One rate. Latencies in seconds, by percentile ("p50"); those of failed requests are left out. `good_rate`:
    requests a second within the SLO, `good_share` of all requests; None without one. `late`: the client's own delay.
    """

    rate: float
    seconds: float
    num_requests: int
    num_failed: int
    errors: Mapping[str, int]  # what was said -> how often
    prompt_tokens: int
    output_tokens: int
    request_rate: float  # answered, a second
    output_rate: float
    total_rate: float
    ttft: Mapping[str, float]
    tpot: Mapping[str, float]
    itl: Mapping[str, float]
    latency: Mapping[str, float]
    late: Mapping[str, float]
    good_rate: float | None
    good_share: float | None
    outcomes: tuple[Outcome, ...]


def summarize(rate: float, seconds: float, outcomes: Sequence[Outcome], slo: Slo | None) -> Round:
    answered = [one for one in outcomes if one.error is None]
    prompt_tokens = sum(one.prompt_tokens or 0 for one in answered)
    output_tokens = sum(one.output_tokens for one in answered)
    good = None if slo is None else sum(map(slo.holds, outcomes))
    return Round(
        rate=rate,
        seconds=seconds,
        num_requests=len(outcomes),
        num_failed=len(outcomes) - len(answered),
        errors=dict(Counter(one.error for one in outcomes if one.error is not None).most_common()),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        request_rate=len(answered) / seconds,
        output_rate=output_tokens / seconds,
        total_rate=(prompt_tokens + output_tokens) / seconds,
        ttft=percentiles([one.ttft for one in answered]),
        tpot=percentiles([one.tpot for one in answered]),
        itl=percentiles([gap for one in answered for gap in one.itl]),
        latency=percentiles([one.latency for one in answered]),
        late=percentiles([one.sent - one.due for one in outcomes]),
        good_rate=None if good is None else good / seconds,
        good_share=None if good is None else good / len(outcomes),
        outcomes=tuple(outcomes),
    )


def percentiles(values: Sequence[float | None]) -> dict[str, float]:
    """Those of PERCENTILES by nearest rank: each is a value that was seen. Empty without values."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return {}
    return {f"p{percent}": ordered[math.ceil(percent / 100 * len(ordered)) - 1] for percent in PERCENTILES}
