"""Whatever arrives, is chunked, preempted, forked, aborted or guessed, each request gets the tokens it gets alone, and
every slot read holds what was written for exactly that history (the checks are in conftest.World and Device)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paceline.config import KVGroup, SchedulerConfig
from paceline.engine.request import RequestSpec
from paceline.sampling.params import SamplingParams

FULL, WINDOW, NARROW = (
    KVGroup("full", (0,), None, 1, 1),
    KVGroup("window", (1,), 6, 1, 1),
    KVGroup("window", (1,), 1, 1, 1),
)
LAYOUTS = [(FULL,), (FULL, WINDOW), (WINDOW,), (FULL, NARROW)]
STEMS = [[1, 2, 3, 0, 1, 2, 3, 0, 2, 2, 1, 3], [1, 2, 3, 0, 3, 3], [0] * 16]


@st.composite
def beams(draw: st.DrawFn, max_num_seqs: int) -> dict[str, object]:
    width = draw(st.integers(2, min(4, max_num_seqs)))
    return {
        "use_beam_search": True,
        "best_of": width,
        "n": draw(st.integers(1, width)),
        "early_stopping": draw(st.sampled_from([False, True, "never"])),
        "length_penalty": draw(st.sampled_from([-1.0, 0.0, 1.0])),
    }


@st.composite
def requests(draw: st.DrawFn, max_num_seqs: int) -> tuple[list[RequestSpec], list[int], list[int | None]]:
    specs: list[RequestSpec] = []
    arrivals: list[int] = []
    aborts: list[int | None] = []
    for index in range(draw(st.integers(1, 5))):
        stem = draw(st.sampled_from(STEMS))
        prompt = stem[: draw(st.integers(1, len(stem)))] + draw(st.lists(st.integers(0, 3), max_size=4))
        prompt_logprobs = draw(st.sampled_from([None, None, 0]))
        limits = [(1, 0), (3, 0), (3, 2), (12, 2), (None, 0), (None, 2)]
        max_tokens, min_tokens = draw(st.sampled_from(limits if prompt_logprobs is None else [(0, 0), *limits]))
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop_token_ids=draw(st.sampled_from([(), (3,)])),
            ignore_eos=draw(st.booleans()),
            prompt_logprobs=prompt_logprobs,
            priority=draw(st.integers(0, 2)),
        )
        namespace, arrival = draw(st.sampled_from(["", "", "lora"])), draw(st.integers(0, 6))
        if max_num_seqs > 1 and max_tokens != 0 and draw(st.integers(0, 2)) == 0:
            params = replace(params, **draw(beams(max_num_seqs)))
        for child in range(1 if params.use_beam_search else draw(st.sampled_from([1, 1, 3]))):
            specs.append(
                RequestSpec(
                    request_id=f"r{index}" if params.use_beam_search else f"r{index}#{child}",
                    prompt_token_ids=tuple(prompt),
                    params=params,
                    seed=child,
                    eos_token_ids=draw(st.sampled_from([frozenset(), frozenset({2})])),
                    namespace=namespace,
                    fork_of=f"r{index}#0" if child else None,
                )
            )
            arrivals.append(arrival)
            aborts.append(draw(st.none() | st.integers(0, 20)) if draw(st.integers(0, 3)) == 0 else None)
    return specs, arrivals, aborts


@st.composite
def scripts(draw: st.DrawFn) -> dict[str, object]:
    block_size = draw(st.sampled_from([1, 2, 4]))
    groups = draw(st.sampled_from(LAYOUTS))
    max_num_seqs = draw(st.sampled_from([1, 3, 16]))
    specs, arrivals, aborts = draw(requests(max_num_seqs))
    # From "one request just fits" to "plenty".
    least = max(-(-(len(spec.prompt_token_ids) + 1) // block_size) for spec in specs)
    num_blocks = tuple(least + draw(st.sampled_from([0, 2, 5, 60])) for _ in groups)
    return {
        "specs": tuple(specs),
        "arrivals": tuple(arrivals),
        "aborts": tuple(aborts),
        "groups": groups,
        "num_blocks": num_blocks,
        "block_size": block_size,
        "scheduler": SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + draw(st.sampled_from([0, 5, 200])),
            max_chunk=draw(st.sampled_from([1, 7, None])),
            policy=draw(st.sampled_from(["fcfs", "priority"])),
        ),
        "prefix_caching": draw(st.booleans()),
        "depth": draw(st.sampled_from([0, 1, 2])),
        "drafts": draw(st.sampled_from([0, 0, 3])),
        "draft_errors": draw(st.sampled_from([0, 1, 3])),
        "reset_at": draw(st.sampled_from([None, None, 8])),
        "max_model_len": draw(st.sampled_from([32, 40])),
    }


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
@given(script=scripts())
def test_every_request_gets_the_tokens_it_gets_alone(play, script):
    play(**script)


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(script=scripts())
def test_every_request_gets_the_tokens_it_gets_alone_for_long(play, script):
    play(**script)
