"""Which engines are asked what, and what is made of their answers; with workers made by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest

from paceline.benchmark import latency, process
from paceline.benchmark.job import Job, read_job, read_result
from paceline.benchmark.latency import Options, run
from paceline.errors import EngineError, UsageError


@pytest.fixture
def workers(answer):
    """workers(rates, errors) -> the jobs it was given, and a function that answers them."""

    def make(rates, errors=None, **fields):
        jobs = []

        def run_job(job):
            jobs.append(job)
            key = (job.engine, job.weight_format)
            if errors and key in errors:
                raise errors[key]
            return answer(job, rates[key], **fields)

        return jobs, run_job

    return make


def test_every_engine_is_asked_once_a_precision(workers):
    rates = {("paceline", "dense"): 100.0, ("paceline", "int8"): 200.0}
    rates |= {("transformers", "dense"): 25.0, ("transformers static", "dense"): 50.0}
    rates |= {("gpt-fast", "dense"): 80.0, ("gpt-fast", "int8"): 100.0}
    jobs, run_job = workers(rates)
    options = Options(
        "llama-3.1-8b", ("dense", "int8"), (32, 8192), rounds=3, against=("transformers", "gpt-fast=/there")
    )
    report = run(options, run_job=run_job)
    assert [(job.engine, job.weight_format) for job in jobs] == list(rates)
    assert [job.dtype for job in jobs] == ["auto"] * 2 + ["bfloat16"] * 4  # theirs is what ours ran in
    assert {job.gpt_fast for job in jobs if job.engine == "gpt-fast"} == {"/there"}
    assert all(job.rounds == 3 and job.config["hidden_size"] == 4096 for job in jobs)
    ratios = {(row.engine, row.weight_format, row.context): row.ratio for row in report.rows}
    assert len(ratios) == 12
    assert ratios["paceline", "int8", 32] is None
    assert ratios["transformers", "dense", 8192] == pytest.approx(4)
    assert ratios["gpt-fast", "int8", 32] == pytest.approx(2)


def test_a_row_is_its_result_over_the_roof(workers):
    jobs, run_job = workers({("paceline", "dense"): 100.0, ("transformers", "dense"): 50.0}, device="cpu")
    report = run(Options("smollm2-135m", against=("transformers",)), run_job=run_job)
    assert len(jobs) == 2  # no static cache on the CPU
    (row, _) = report.rows
    assert row.bytes_per_second == pytest.approx(100e9)
    assert row.share == pytest.approx(0.5)
    assert row.seconds_per_token == pytest.approx(0.01)
    assert row.ttft == 0.02
    assert report.failures == ()


def test_the_roof_is_the_most_that_any_process_read(answer):
    bandwidths = iter([150e9, 300e9])
    report = run(
        Options("smollm2-135m", ("dense", "int8")), run_job=lambda job: answer(job, bandwidth=next(bandwidths))
    )
    assert report.roof == 300e9
    assert [row.share for row in report.rows] == pytest.approx([1 / 3, 1 / 3])


def test_one_failure_is_told_and_the_others_go_on(workers):
    rates = {("paceline", "dense"): 100.0, ("gpt-fast", "dense"): 50.0}
    jobs, run_job = workers(
        rates,
        {
            ("paceline", "int8"): EngineError("it ran out of memory"),
            ("transformers", "dense"): UsageError("it is not installed"),
            ("transformers static", "dense"): EngineError("it did not compile"),
        },
    )
    told = []
    options = Options("llama-3.1-8b", ("dense", "int8"), against=("transformers", "gpt-fast=x"))
    rates["gpt-fast", "int8"] = 60.0
    report = run(options, tell=told.append, run_job=run_job)
    assert len(jobs) == 6
    assert [(f.engine, f.error) for f in report.failures] == [
        ("paceline", "it ran out of memory"),
        ("transformers", "it is not installed"),
        ("transformers static", "it did not compile"),
    ]
    ratios = {(row.engine, row.weight_format): row.ratio for row in report.rows}
    assert ratios["gpt-fast", "int8"] == pytest.approx(100 / 60)  # beside dense: our int8 has no figure
    assert "paceline int8 failed: it ran out of memory" in told


def test_nothing_measured_is_an_error(workers):
    _, run_job = workers({}, {("paceline", "dense"): EngineError("it ran out of memory")})
    with pytest.raises(EngineError, match="it ran out of memory"):
        run(Options("llama-3.1-8b"), run_job=run_job)
    jobs, run_job = workers({}, {("paceline", "dense"): UsageError("no such device")})
    with pytest.raises(UsageError, match="no such device"):
        run(Options("llama-3.1-8b", ("dense", "int8")), run_job=run_job)
    assert len(jobs) == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"contexts": (0,)}, "at least 1 token, got 0"),
        ({"contexts": ()}, "at least 1 token"),
        ({"contexts": (32, 32)}, "contexts names the same twice"),
        ({"weight_formats": ("int8", "int8")}, "weight_formats names the same twice"),
        ({"weight_formats": ()}, "no weight format"),
        ({"against": ("vllm",)}, "transformers or gpt-fast=DIR, got 'vllm'"),
        ({"against": ("gpt-fast",)}, "gpt-fast=DIR, got 'gpt-fast'"),
        ({"against": ("transformers=x",)}, "got 'transformers=x'"),
    ],
)
def test_what_is_refused(given, says):
    with pytest.raises(UsageError, match=says):
        Options("smollm2-135m", **given)


def test_jobs_and_results_survive_json(answer):
    job = Job("paceline", "x", {"a": [1]}, (32, 64), 5, threads=2)
    assert read_job(json.loads(json.dumps(dataclasses.asdict(job)))) == job
    result = answer(job)
    assert read_result(json.loads(json.dumps(dataclasses.asdict(result)))) == result


def test_a_worker_that_dies_is_an_engine_error(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'first line' >&2\necho 'Killed by the kernel' >&2\nexit 9\n")
    script.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(script))
    with pytest.raises(EngineError, match="ended with code 9: Killed by the kernel"):
        latency.run_worker(Job("paceline", "x", {}, (32,), 1))


def test_a_worker_that_hangs_is_ended(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 30\n")
    script.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(script))
    monkeypatch.setattr(process, "WORKER_SECONDS", 0.3)
    with pytest.raises(EngineError, match="its process was ended after"):
        latency.run_worker(Job("paceline", "x", {}, (32,), 1))
