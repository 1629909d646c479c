"""How memory is divided, and that what is planned is what the engine then allocates."""

from __future__ import annotations

import pytest

import paceline
from paceline import LLM
from paceline.config import CacheConfig, KVGroup, SchedulerConfig
from paceline.engine import build
from paceline.engine.memory import Room, divide
from paceline.planner import inference

GROUP = KVGroup("full", (0, 1), None, 2, 8)  # 2 * 2 * 2 * 8 * 4 = 256 bytes a token in float32


def divided(room: Room, *, longest: int = 64, shorten: bool = True):
    return divide(
        [GROUP], room, CacheConfig(4), SchedulerConfig(2, 16), bytes_per_value=4, longest=longest, shorten=shorten
    )


def test_everything_that_requests_can_use_and_no_more():
    context, plan = divided(Room(10**9, lambda context: 0))
    assert (context, plan.num_tokens) == (64, 2 * 64)


def test_a_context_is_as_long_as_the_room_that_its_own_steps_leave():
    """A token of context costs 256 bytes of cache and 100 of a step; the null block 4 * 256."""
    room = Room(10_000, lambda context: 100 * context)
    context, plan = divided(room)
    assert context == 24  # 28 tokens: 1024 + 28 * 356 > 10,000
    assert plan.nbytes <= room.free(context)
    assert divided(room, shorten=False)[0] == 64


def test_the_caches_share_and_its_given_size():
    assert divided(Room(40_000, lambda context: 0, cache_share=0.25))[1].nbytes <= 10_000
    assert Room(40_000, lambda context: 0, cache_bytes=5_000).budget(64) == 5_000


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantization": "int8"},
        {"quantization": "int4"},
        {"quantization": "fp8"},
        {"max_model_len": 64},
        {"max_num_seqs": 4},
    ],
)
@pytest.mark.parametrize("available", [12_000_000, 10**9])
def test_what_is_planned_is_what_the_engine_allocates(tiny_directory, monkeypatch, options, available):
    monkeypatch.setattr(build, "available_bytes", lambda device: available)
    monkeypatch.setattr(inference, "available_bytes", lambda device: available)
    plan = paceline.plan(str(tiny_directory), device="cpu", **options)
    with LLM(str(tiny_directory), device="cpu", **options) as llm:
        engine = llm.model.engine
        kv = engine.runner.kv
        assert sum(layer.k_HSD.nbytes + layer.v_HSD.nbytes for layer in kv) == sum(g.nbytes for g in plan.cache)
        assert engine.config.max_model_len == plan.max_model_len
        assert str(llm.model.dtype) == f"torch.{plan.dtype}"
    assert plan.fits
    assert plan.stored == {"float32": plan.num_parameters}
