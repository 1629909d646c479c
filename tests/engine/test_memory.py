"""How memory is divided, and that what is planned is what the engine then allocates."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import paceline
from paceline import LLM, sizing, sizing_cuda
from paceline.config import (
    AttentionConfig,
    CacheConfig,
    DecoderConfig,
    KVGroup,
    MlpConfig,
    NormConfig,
    RopeConfig,
    SchedulerConfig,
)
from paceline.engine import build
from paceline.engine.decode_buffers import FIELDS
from paceline.engine.decode_step import DecodeStep
from paceline.engine.memory import Room, Sizes, divide
from paceline.engine.prompt_step import PromptStep
from paceline.errors import OutOfMemoryError
from paceline.kernels import decode_attention, gemv
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
        sizes = llm.model.sizes
        assert (sizes.loading, sizes.graph_pool) == (plan.loading, plan.graph_pool)
        assert sizes.weights == plan.weights
    assert plan.fits
    assert plan.stored == {"float32": plan.num_parameters}


def test_loading_holds_what_is_planned(tiny_directory, live_bytes):
    """A matrix before it is packed, and its packing; in float32 the checkpoint's tensors are views of its file."""
    for quantization in ("int8", "int4", "fp8"):
        gc.collect()
        with live_bytes() as live, LLM(str(tiny_directory), quantization=quantization, num_blocks=1) as llm:
            sizes = llm.model.sizes
            cache = sum(layer.k_HSD.nbytes + layer.v_HSD.nbytes for layer in llm.model.engine.runner.kv)
            held = live.peak - sizes.weights.total
            assert held <= max(sizes.loading, cache)


@pytest.mark.parametrize(
    ("format", "tied", "read", "expected"),
    [
        ("dense", False, 0, 0),  # read into their places
        ("dense", False, 2, 2 * 128256 * 4096),  # the head as it is read
        ("dense", True, 2, 2 * 28672 * 4096),  # the widest of a layer
        ("int8", False, 0, 2 * 128256 * 4096 + 4 * 1024 * (8 + 8 * 4096)),  # the head, and 4 chunks of 4 M values
        ("int8", True, 2, 4 * 1024 * (8 + 8 * 4096)),  # the embedding stays
    ],
)
def test_what_loading_holds_beside_the_weights(format, tied, read, expected):
    sizes = sizes_on_cuda(1, format=format)
    config = replace(sizes.config, tie_embeddings=tied)
    assert replace(sizes, config=config, read_bytes=read).loading == expected


def test_loading_that_needs_more_than_there_is_is_told(tiny_directory, monkeypatch):
    monkeypatch.setattr(sizing, "loading_bytes", lambda *_, **__: 1 << 40)
    with pytest.raises(OutOfMemoryError, match=r"1024\.00 GiB more while they are loaded"):
        LLM(str(tiny_directory), device="cpu")


def test_memory_that_runs_out_while_loading_is_given_back(tiny_directory, monkeypatch):
    """The error's traceback would keep the decoder alive, half of it loaded."""
    made: list[weakref.ref[object]] = []

    def full(model, *arguments, **options):
        made.append(weakref.ref(model.embedding))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(build, "ModelRunner", full)
    with pytest.raises(OutOfMemoryError, match="set kv_cache_gib") as raised:
        LLM(str(tiny_directory), device="cpu")
    assert raised.value.__context__ is None
    assert made[0]() is None
    monkeypatch.undo()
    with LLM(str(tiny_directory), device="cpu", num_blocks=8) as llm:  # the same process may try again
        assert llm.model.sizes is not None


LLAMA = {"hidden_size": 4096, "num_layers": 32, "vocab_size": 128256, "max_position": 8192}


def sizes_on_cuda(seqs: int, *, format: str = "dense", dtype: torch.dtype = torch.bfloat16) -> Sizes:
    """Llama-3.1-8B's, on a GPU that need not be here."""
    config = DecoderConfig(
        family="llama",
        attention=AttentionConfig(32, 8, 128, 0.09),
        rope=RopeConfig(5e5, 128),
        mlp=MlpConfig(14336),
        norm=NormConfig(1e-5),
        **LLAMA,
    )
    scheduler = SchedulerConfig(seqs, 2048)
    return Sizes(config, dtype, format, torch.device("cuda"), scheduler, 16, graphs=True, workspace=33 << 20)


def test_one_stream_unpacks_nothing_where_a_kernel_multiplies_what_is_packed():
    shape = sizing.StepShape(1, 1, 4096, 1, greedy=True, scores=False)
    assert sizes_on_cuda(1, format="int8").step_of(shape) == sizes_on_cuda(1).step_of(shape) < 30 << 20
    many = replace(shape, num_tokens=257, chunk=257)
    assert sizes_on_cuda(1, format="int8").step_of(many) - sizes_on_cuda(1).step_of(many) == 128 << 20


def test_the_graphs_pool_is_one_segment_and_small_tensors():
    one = sizes_on_cuda(1)
    assert one.graph_reserve % (2 << 20) == 0
    assert one.graph_reserve <= one.graph_pool <= one.graph_reserve + (14 << 20)
    # 64 rows go through cuBLAS, whose workspace lies in the pool, in float32 one does.
    assert sizes_on_cuda(64).graph_reserve > 32 * 128256 * sizing.STATIC_SAMPLING_BYTES + (33 << 20)
    assert sizes_on_cuda(1, dtype=torch.float32).graph_reserve > one.graph_reserve + (31 << 20)
    without = replace(one, graphs=False)
    assert (without.graph_pool, without.buffers(4096), one.buffers(4096)) == (
        0,
        0,
        (8 * 13 + 16 + 4 * 256) + 513 * (24 + 2 * one.config.hidden_size) + 17 * (8 + 4 * 256) + 4,
    )


@pytest.mark.parametrize(("rows", "groups", "context"), [(1, 1, 100), (24, 2, 4096)])
def test_the_buffers_of_captured_steps_with_prompts(rows, groups, context):
    kv_groups = (GROUP,) * groups
    model = SimpleNamespace(kv_groups=kv_groups, device=torch.device("cpu"), dtype=torch.bfloat16)
    step = PromptStep(model, [], 16, hidden_size=24, max_decodes=rows, max_model_len=context)
    config = SimpleNamespace(kv_groups=kv_groups, hidden_size=24)
    assert step.nbytes == sizing_cuda.prompt_buffer_bytes(config, rows, context, 16, 2)


@pytest.mark.parametrize(("rows", "groups", "context"), [(1, 1, 100), (24, 2, 4096)])
def test_the_buffers_of_captured_decodes(rows, groups, context):
    model = SimpleNamespace(kv_groups=(GROUP,) * groups, device=torch.device("cpu"), vocab_size=8)
    step = DecodeStep(model, [], 16, max_rows=rows, max_model_len=context)
    assert step.nbytes == sizing_cuda.decode_buffer_bytes(groups, rows, context, 16)
    assert len(FIELDS) == sizing_cuda.DECODE_FIELDS


def test_a_workspace_by_compute_capability():
    assert sizing_cuda.workspace_bytes((8, 9)) == (8 << 20) + (128 << 10) + (1 << 20)
    assert sizing_cuda.workspace_bytes((9, 0)) == sizing_cuda.workspace_bytes(None) == 33 << 20


def test_the_kernels_limits_are_the_formulas():
    assert sizing.PACKED_ROWS == gemv.MAX_ROWS
    assert sizing.MOST_SPLITS >= decode_attention.MOST_SPLITS
