"""Many streams: which engines are asked what, what is made of their answers, and the measuring process itself."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from paceline.benchmark import throughput_worker
from paceline.benchmark.protocol import DECODED
from paceline.benchmark.roof import Costs, work_of
from paceline.benchmark.throughput import BatchJob, BatchResult, Options, Run, Work, read_job, read_result, run
from paceline.benchmark.throughput_worker import BatchSubject
from paceline.benchmark.workload import Workload
from paceline.errors import EngineError, UsageError

LAYER = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 96  # q, k and v, out; gate, up and down
STEP_VALUES = 2 * LAYER + 5 * 64 + 256 * 64  # norms and head; not the embedding
KV_VALUES = 2 * 2 * 2 * 16  # a token: layers, key and value, heads, head dim


def answer(job: BatchJob, seconds: float, **fields) -> BatchResult:
    runs = [Run(batch, (9.0, seconds, seconds), 0, batch * 100, Work(0, 0, 10**9, 10**9)) for batch in job.batches]
    if job.workload is not None:
        runs.append(Run(None, (seconds,), 300, 100, Work(10**9, 4 * 10**12, 10**9, 10**9)))
    given = {
        "engine": job.engine,
        "version": None if job.engine == "paceline" else "5.0",
        "weight_format": job.weight_format,
        "dtype": "bfloat16",
        "device": "cuda:0",
        "machine": {"device": "H100", "torch": "2.11", "python": "3.12"},
        "runs": tuple(runs),
        "step_weight_bytes": 10**9,
        "bandwidth": 10e9,
        "operations": 20e12,
        "peak": 2**30,
        "start": 2.5,
    }
    return BatchResult(**{**given, **fields})


def test_engines_are_asked_alike_and_a_row_is_its_run_under_the_roof():
    jobs = []

    def run_job(job):
        jobs.append(job)
        fields = {"bandwidth": 5e9} if job.engine == "transformers" else {}
        return answer(job, {"dense": 1.0, "int8": 0.5}[job.weight_format] * (4 if fields else 1), **fields)

    options = Options("llama-3.1-8b", batches=(1, 4), weight_formats=("dense", "int8"), against=("transformers",))
    report = run(options, run_job=run_job)
    assert [(job.engine, job.weight_format, job.dtype) for job in jobs] == [
        ("paceline", "dense", "auto"),
        ("paceline", "int8", "auto"),
        ("transformers", "dense", "bfloat16"),
    ]
    assert {(job.batches, job.workload, job.streams) for job in jobs} == {((1, 4), Workload(), 256)}
    rows = {(row.engine, row.weight_format, row.batch): row for row in report.rows}
    assert len(rows) == 9
    assert rows["paceline", "int8", 4].rate == pytest.approx(800)
    assert rows["paceline", "int8", 4].roof_rate == pytest.approx(4000)  # 1e9 bytes at 10e9 a second
    offline = rows["transformers", "dense", None]
    # Prompts are bound by operations, decodes by bytes; its own slower probe does not lower its roof.
    assert offline.share == pytest.approx((4 / 20 + 1 / 10) / 4)
    assert offline.total_rate == pytest.approx(100)
    assert offline.bytes_per_second == pytest.approx(0.5e9)
    assert offline.ratio == pytest.approx(4)
    assert rows["paceline", "dense", None].ratio is None


def test_a_failure_is_told_and_paceline_must_have_a_figure():
    def run_job(job):
        if job.engine == "transformers":
            raise UsageError("it is not installed")
        return answer(job, 1.0)

    told = []
    report = run(Options("smollm2-135m", against=("transformers",)), tell=told.append, run_job=run_job)
    assert [(one.engine, one.error) for one in report.failures] == [("transformers", "it is not installed")]
    assert "transformers dense failed: it is not installed" in told

    def none(job):
        raise EngineError("out of memory")

    with pytest.raises(EngineError, match="out of memory"):
        run(Options("smollm2-135m"), run_job=none)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"streams": 0}, "streams must be at least 1"),
        ({"batches": (4, 4)}, "batches names the same twice: 4, 4"),
        ({"batches": (0,)}, "at least 1 stream, got 0"),
        ({"offline": False}, "nothing to measure"),
        ({"step_tokens": 100}, "a step of 100 tokens does not hold 256 streams"),
        ({"batches": (512,), "step_tokens": 300}, "does not hold 512 streams"),
        ({"weight_formats": ()}, "no weight format"),
        ({"against": ("vllm",)}, "against must be transformers, got 'vllm'"),
    ],
)
def test_what_is_refused(given, says):
    with pytest.raises(UsageError, match=says):
        Options("smollm2-135m", **given)


def test_jobs_and_results_survive_json():
    job = BatchJob("paceline", "x", {"a": [1]}, Workload(3, prefix=4), (1, 2), 5, 8, threads=2)
    assert read_job(json.loads(json.dumps(dataclasses.asdict(job)))) == job
    assert (
        read_job(json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(job, workload=None))))).workload is None
    )
    result = answer(job, 1.0)
    assert read_result(json.loads(json.dumps(dataclasses.asdict(result)))) == result


# ------------------------------------------------------------------------------------------------------- the roof


def test_work_is_counted_by_hand(tiny_config):
    costs = Costs(tiny_config, torch.float32, 4 * STEP_VALUES)
    assert costs.values == STEP_VALUES
    # Answers of 3 and 2 tokens: the first of each comes with its prompt, the others attend to 11, 12 and to 21 tokens.
    work = work_of(costs, [(10, 3), (20, 2)], shared=4, streams=8, step_tokens=16)
    assert work.prompt_operations == 2 * STEP_VALUES * 26
    assert work.prompt_bytes == 2 * 4 * STEP_VALUES
    assert work.decode_bytes == 2 * 4 * STEP_VALUES + 4 * KV_VALUES * (11 + 12 + 21)
    assert work.decode_operations == 2 * STEP_VALUES * 3
    one_by_one = work_of(costs, [(10, 3), (20, 2)], shared=0, streams=1, step_tokens=16)
    assert one_by_one.decode_bytes - work.decode_bytes == 4 * STEP_VALUES
    assert Work(10, 100, 30, 40).seconds(bandwidth=10, operations=20) == 100 / 20 + 30 / 10


# ---------------------------------------------------------------------------------------------------- the process


def tiny_job(config, **fields):
    given = {"engine": "paceline", "shape": "tiny", "config": config, "workload": None, "batches": ()}
    return BatchJob(**{**given, "rounds": 1, "streams": 4, "step_tokens": 64, "device": "cpu", "threads": 1, **fields})


def test_paceline_offline_and_alone(tiny_config):
    result = throughput_worker.run(tiny_job(tiny_config, workload=Workload(6, 20, 5, True, 16, 2), batches=(3,)))
    alone, offline = result.runs
    assert (alone.batch, alone.output_tokens, len(alone.seconds)) == (3, 3 * DECODED, 1)
    # The step that makes token 17 attends to 48 tokens, the one that makes token 144 to 175.
    reads = STEP_VALUES + 3 * KV_VALUES * (48 + 175) / 2
    assert alone.work.decode_bytes == pytest.approx(4 * DECODED * reads, rel=1e-6)
    assert offline.batch is None
    assert offline.prompt_tokens > 6 * 20
    assert offline.work.prompt_operations == 2 * STEP_VALUES * (offline.prompt_tokens - 4 * 16)
    assert result.version is None
    assert result.bandwidth > 1e8
    assert result.operations > 1e8
    assert min(alone.work.seconds(result.bandwidth, result.operations), *offline.seconds) > 0


def test_transformers_is_given_the_same_and_counts_what_was_asked(tiny_config):
    pytest.importorskip("transformers")
    job = tiny_job(tiny_config, engine="transformers", dtype="float32", workload=Workload(5, 12, 6, True))
    result = throughput_worker.run(job)
    (theirs,) = result.runs
    (ours,) = throughput_worker.run(tiny_job(tiny_config, workload=Workload(5, 12, 6, True))).runs
    assert result.version
    assert dataclasses.replace(theirs, seconds=()) == dataclasses.replace(ours, seconds=())


def test_rounds_after_the_first_count_and_lengths_are_checked(tiny_config, monkeypatch):
    """The first round, in which kernels are loaded and graphs captured, is thrown away."""
    asked = []

    def build(job, device):
        def generate(asks):
            asked.append([tuple(ask.prompt) for ask in asks])
            return [[0] * (ask.num_tokens - (len(asked) > 3)) for ask in asks]

        return BatchSubject(generate, None, "float32", 1)

    monkeypatch.setattr(throughput_worker, "_build", build)
    job = tiny_job(tiny_config, workload=Workload(2, 8, 4), rounds=2)
    (found,) = throughput_worker.run(job).runs
    assert len(found.seconds) == 2
    assert len(asked) == 3
    assert len({prompt for prompts in asked for prompt in prompts}) == 6
    with pytest.raises(EngineError, match="asked for 4 tokens and got 3"):
        throughput_worker.run(job)
