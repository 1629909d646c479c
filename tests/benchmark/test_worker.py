"""The measuring process: what it says of paceline and of transformers, on a model small enough for any machine."""

from __future__ import annotations

import gc
import io
import json
import sys
import types
from dataclasses import asdict, dataclass, replace

import pytest
import torch

from paceline.benchmark.engines import gpt_fast
from paceline.benchmark.job import Job, at_once
from paceline.benchmark.latency import run_worker
from paceline.benchmark.worker import main, run
from paceline.errors import UsageError

LAYER = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 96  # q, k and v, out; gate, up and down
STEP_VALUES = 2 * LAYER + 5 * 64 + 256 * 64  # norms and head; not the embedding
KV_VALUES = 2 * 2 * 2 * 16  # a token: layers, key and value, heads, head dim


def job(config, engine="paceline", **options):
    return Job(engine, "tiny", config, (32,), 1, **{"device": "cpu", "threads": 1, **options})


def test_paceline(tiny_config):
    result = run(job(tiny_config))
    assert (result.engine, result.version, result.dtype, result.device) == ("paceline", None, "float32", "cpu")
    assert list(result.phases) == ["import", "device", "resolve", "tokenizer", "weights", "cache", "first token"]
    assert result.step_weight_bytes == 4 * STEP_VALUES
    (context,) = result.contexts
    assert len(context.timing.decode) == 1
    assert context.timing.tokens_per_second > 1
    # The step that makes token 17 attends to 48 tokens, the one that makes token 144 to 175.
    assert context.bytes_per_token == 4 * (STEP_VALUES + KV_VALUES * (48 + 175) / 2)
    assert result.head_bits == 32
    assert result.memory.measured is None
    assert result.memory.planned["weights"] == 4 * (STEP_VALUES + 256 * 64) + 16 * 4  # frequencies of the rotary
    assert result.memory.planned["cache"] == 4 * KV_VALUES * 16 * (11 + 1)  # 176 tokens, and the null block
    assert result.memory.planned["step"] > 0
    assert 1e7 < result.memory.peak < 1e12
    assert result.bandwidth > 1e8


@pytest.mark.slow  # starts two ranks, 8 s of a core
def test_a_model_over_two_devices_reads_half_of_it_from_each(tiny_config):
    result = run(job(tiny_config, tensor_parallel_size=2))
    halved = 2 * LAYER // 2 + 5 * 64 + 128 * 64
    assert result.step_weight_bytes == 4 * halved
    assert result.contexts[0].bytes_per_token == 4 * (halved + KV_VALUES / 2 * (48 + 175) / 2)
    assert result.memory.planned["cache"] == 4 * KV_VALUES // 2 * 16 * (11 + 1)
    assert result.memory.peak is None
    assert result.head_bits == 32
    assert {"ranks", "connect", "weights"} < set(result.phases)


def test_int8_keeps_eight_bits_for_the_head(tiny_config):
    result = run(job(tiny_config, weight_format="int8"))
    assert 8 <= result.head_bits < 9
    assert result.step_weight_bytes < 4 * STEP_VALUES / 3


def test_transformers_reads_the_same_bytes(tiny_config):
    pytest.importorskip("transformers")
    ours = run(job(tiny_config))
    theirs = run(job(tiny_config, engine="transformers", dtype="float32"))
    assert theirs.contexts[0].bytes_per_token == ours.contexts[0].bytes_per_token
    assert theirs.version
    assert theirs.memory.planned is None


def test_an_error_comes_out_of_its_process(tiny_config):
    with pytest.raises(UsageError, match="more than the 512 positions"):
        run_worker(Job("paceline", "tiny", tiny_config, (500,), 1, device="cpu"))


def test_whatever_an_engine_raises_is_its_answer(tiny_config, tmp_path, monkeypatch):
    for name in ("model", "generate", "quantize"):
        (tmp_path / f"{name}.py").write_text("raise ZeroDivisionError('first line\\nsecond line')\n")
    given = job(tiny_config, engine="gpt-fast", dtype="float32", gpt_fast=str(tmp_path))
    path = tmp_path / "answer.json"
    monkeypatch.setattr(sys, "argv", ["worker", str(path)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(asdict(given))))
    assert main() == 0
    assert json.loads(path.read_text()) == {"error": "ZeroDivisionError: first line", "exit_code": 1}


@pytest.mark.gpu
@pytest.mark.parametrize("weight_format", ["dense", "int8"])
def test_the_plan_is_what_the_device_holds(weight_format):
    from paceline.benchmark.shapes import read_shape

    gc.collect()
    torch.cuda.empty_cache()  # what earlier tests left
    result = run(
        Job(
            "paceline", "smollm2-135m", read_shape("smollm2-135m"), (32,), 1, device="cuda", weight_format=weight_format
        )
    )
    planned, measured = result.memory.planned, result.memory.measured
    assert list(measured) == list(planned)
    assert measured["weights"] == pytest.approx(planned["weights"], rel=0.05)
    assert measured["cache"] == planned["cache"]
    assert measured["decode buffers"] == planned["decode buffers"]
    # Bounds, the allocator's rounding aside. cuBLAS has its workspace already where an earlier test multiplied.
    for part in ("loading", "graphs", "cuBLAS", "step"):
        assert measured[part] <= planned[part] + 2**20, part
    assert measured["graphs"] > 0
    planned = {**planned, "cuBLAS": min(planned["cuBLAS"], measured["cuBLAS"] + 2**20)}
    assert at_once(measured) == pytest.approx(at_once(planned), rel=0.05)
    assert result.memory.peak == pytest.approx(at_once(planned), rel=0.05)


# gpt-fast itself is not on this machine: its public interface, as its README and signatures show it.


@dataclass
class ModelArgs:
    block_size: int = 2048
    vocab_size: int = 32000
    n_layer: int = 32
    n_head: int = 32
    dim: int = 4096
    intermediate_size: int | None = None
    n_local_heads: int = -1
    rope_base: float = 10000
    norm_eps: float = 1e-5


def test_gpt_fast_takes_the_shape(tiny_config):
    model = types.SimpleNamespace(ModelArgs=ModelArgs)
    config = {**tiny_config, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    arguments = gpt_fast.model_arguments(config, model)  # this old one scales nothing
    assert arguments == ModelArgs(512, 256, 2, 4, 64, 96, 2, 10000.0, 1e-5)
    for refused in ({"model_type": "qwen3"}, {"tie_word_embeddings": True}):
        with pytest.raises(UsageError, match="an untied head only"):
            gpt_fast.model_arguments({**tiny_config, **refused}, model)


def test_gpt_fast_in_a_directory_that_is_not_its_own(tiny_config, tmp_path):
    given = job(tiny_config, engine="gpt-fast", dtype="float32")
    with pytest.raises(UsageError, match="is no checkout of gpt-fast"):
        run(replace(given, gpt_fast=str(tmp_path)))
    for name in ("model", "generate", "quantize"):
        (tmp_path / f"{name}.py").write_text("import a_package_that_is_not_there\n")
    before = list(sys.path)
    with pytest.raises(UsageError, match="does not import here: No module named 'a_package_that_is_not_there'"):
        run(replace(given, gpt_fast=str(tmp_path)))
    assert sys.path == before


@pytest.mark.gpu
def test_gpt_fast_values_of_four_bits_keep_their_places():
    """Multiplied by the identity, the packed matrix is itself; its kernel takes values less 8."""
    values_NK = torch.randint(0, 16, (64, 1024), dtype=torch.int32, device="cuda")
    ones_and_zeros = torch.stack([torch.ones(32, 64), torch.zeros(32, 64)], -1).to("cuda", torch.bfloat16)
    packed, scales_and_zeros = gpt_fast.packed_int4(
        lambda weight, n_bit, groupsize: (values_NK, ones_and_zeros), values_NK, 32, 8
    )
    identity = torch.eye(1024, dtype=torch.bfloat16, device="cuda")
    found_KN = torch.ops.aten._weight_int4pack_mm(identity, packed, 32, scales_and_zeros)
    assert torch.equal(found_KN.T, (values_NK - 8).to(torch.bfloat16))


def test_gpt_fast_counts_all_but_the_embedding():
    model = torch.nn.Sequential(torch.nn.Embedding(100, 8), torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
    assert gpt_fast._step_weight_bytes(model) == 4 * (8 * 4 + 4) + 4 * 4 * 4 + 8
