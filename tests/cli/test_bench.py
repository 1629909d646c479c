"""`paceline bench latency`: its tables, its JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paceline.benchmark import latency, throughput
from paceline.benchmark.job import Context, Job, Memory, Result
from paceline.benchmark.protocol import DECODED, Timing
from paceline.benchmark.throughput import BatchJob, BatchResult, Run, Work
from paceline.benchmark.workload import Workload
from paceline.cli.app import main
from paceline.errors import EngineError

RATES = {"paceline": 200.0, "transformers": 50.0}


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Answers in place of the processes, and the jobs that they were given."""
    jobs: list[Job] = []

    def run_worker(job: Job) -> Result:
        jobs.append(job)
        if job.engine not in RATES:
            raise EngineError(f"no {job.engine} here")
        timing = Timing(32, (0.0123,), (DECODED / RATES[job.engine],))
        sizes = {"weights": 15 * 2**30, "cache": 2**29, "step": 2**28}
        return Result(
            engine=job.engine,
            version=None if job.engine == "paceline" else "5.17",
            weight_format=job.weight_format,
            dtype="bfloat16",
            device="cuda",
            machine={"device": "NVIDIA H100", "torch": "2.11", "python": "3.12"},
            contexts=tuple(Context(timing, 15 * 10**9) for _ in job.contexts),
            step_weight_bytes=15 * 10**9,
            head_bits=16.0,
            phases={"process": 0.25, "import": 4.5, "weights": 2.25},
            memory=Memory(sizes if job.engine == "paceline" else None, {**sizes, "step": 2**27}, 16 * 2**30),
            bandwidth=3.2e12,
        )

    monkeypatch.setattr(latency, "run_worker", run_worker)
    return jobs


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_the_tables(workers: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "latency", "llama-3.1-8b", "--quantize", "none", "--quantize", "int8"]) == 0
    captured = capsys.readouterr()
    assert [job.weight_format for job in workers] == ["dense", "int8"]
    assert "llama-3.1-8b  bfloat16, NVIDIA H100 (cuda), paceline 0.1.0, torch 2.11, python 3.12" in captured.out
    assert "Roof: 3,200 GB/s" in " ".join(captured.out.split())
    rows = cells(captured.out)
    speed = ["32", "200.0", "5.00", "15.000", "3,000.0", "94%", "12.3"]
    assert ["paceline", "dense,", "head", "16", "bit", *speed] in rows
    assert ["paceline", "int8,", "head", "16", "bit", *speed] in rows
    assert ["paceline", "dense", "0.25", "4.50", "2.25", "7.00"] in rows
    memory = ["15.000", "/", "15.000", "0.500", "/", "0.500", "0.125", "/", "0.250", "15.625", "/", "15.750", "16.000"]
    assert ["paceline", "dense", *memory] in rows
    assert captured.err.splitlines()[0] == "paceline dense ..."


def test_another_engine_has_a_ratio_and_a_failed_one_its_reason(
    workers: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "latency", "llama-3.1-8b", "--against", "transformers", "--quiet"]) == 1
    captured = capsys.readouterr()
    assert [job.engine for job in workers] == ["paceline", "transformers", "transformers static"]
    (row,) = [row for row in cells(captured.out) if row[:2] == ["transformers", "dense,"]]
    assert row[-1] == "4.00x"
    assert captured.err == "error: not measured: transformers static dense: no transformers static here\n"


def test_json_has_everything(workers: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "latency", "llama-3.1-8b", "--context", "32", "--rounds", "2", "--dtype", "float16"]
    path = tmp_path / "figures.json"
    assert main([*arguments, "--json", str(path)]) == 0
    assert "One stream" in capsys.readouterr().out
    assert main([*arguments, "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    found: dict[str, Any] = json.loads(path.read_text())
    assert found == printed
    assert (workers[0].rounds, workers[0].dtype, workers[0].contexts) == (2, "float16", (32,))
    assert found["paceline"] == "0.1.0"
    assert found["config"]["num_hidden_layers"] == 32
    assert found["roof"] == 3.2e12
    (row,) = found["rows"]
    assert row == {
        "engine": "paceline",
        "weight_format": "dense",
        "context": 32,
        "tokens_per_second": 200.0,
        "seconds_per_token": 0.005,
        "ttft": 0.0123,
        "bytes_per_token": 15 * 10**9,
        "bytes_per_second": 3e12,
        "share": 0.9375,
        "ratio": None,
    }
    (result,) = found["results"]
    assert result["phases"] == {"process": 0.25, "import": 4.5, "weights": 2.25}
    assert result["contexts"][0]["timing"]["decode"] == [0.64]
    assert result["memory"]["planned"]["weights"] == 15 * 2**30


def test_the_plot(workers: list[Job], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "figure.png"
    assert main(["bench", "latency", "llama-2-7b", "--quiet", "--plot", str(path)]) == 0
    assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["llama-3.1-8"], "did you mean 'llama-3.1-8b'?"),
        (["missing.json"], "missing.json: no such file"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
        (["--context", "0"], "at least 1 token, got 0"),
        (["--context", "32", "--context", "32"], "the same twice: 32, 32"),
        (["--quantize", "int3"], "'int3' is not one of 'none', 'int8'"),
        (["--against", "vllm"], "against must be transformers or gpt-fast=DIR, got 'vllm'"),
        (["--json", "no/such/file.json"], "--json no/such/file.json: there is no such directory"),
        (["--shape", "x"], "unknown option '--shape'"),
    ],
)
def test_what_it_refuses(
    arguments: list[str], says: str, workers: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "latency", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert not workers


def test_in_earnest(paceline: Any, tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "vocab_size": 200,
        "max_position_embeddings": 256,
        "torch_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    process = paceline(
        *("bench", "latency", str(tmp_path), "--device", "cpu", "--rounds", "1", "--threads", "1", "--json", "-")
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert found["command"].startswith("paceline bench latency ")
    assert found["rows"][0]["tokens_per_second"] > 1
    phases = found["results"][0]["phases"]
    assert list(phases) == ["process", "import", "device", "resolve", "tokenizer", "weights", "cache", "first token"]
    assert 0.01 < phases["process"] < 60


# ----------------------------------------------------------------------------------------------------- throughput


@pytest.fixture
def batch_workers(monkeypatch: pytest.MonkeyPatch) -> list[BatchJob]:
    jobs: list[BatchJob] = []

    def run_worker(job: BatchJob) -> BatchResult:
        jobs.append(job)
        if job.engine == "transformers":
            raise EngineError("no transformers here")
        work = Work(10**12, 10**15, 10**13, 10**14)
        runs = [Run(batch, (2.0,), 0, 128 * batch, work) for batch in job.batches]
        if job.workload is not None:
            runs.append(Run(None, (8.0,), 4000, 2000, work))
        return BatchResult(
            job.engine,
            None,
            job.weight_format,
            "bfloat16",
            "cuda",
            {"device": "NVIDIA H100", "torch": "2.11", "python": "3.12"},
            tuple(runs),
            15 * 10**9,
            bandwidth=3e12,
            operations=7e14,
            peak=2**34,
            start=4.5,
        )

    monkeypatch.setattr(throughput, "run_worker", run_worker)
    return jobs


def test_throughput_tables(batch_workers: list[BatchJob], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quantize", "int8", "--batch", "16", "--mixed", "--prefix", "64", "--groups", "2", "--seed", "5"]
    assert main(["bench", "throughput", "llama-3.1-8b", "--requests", "100", "--quiet", *arguments]) == 0
    (job,) = batch_workers
    assert job.workload == Workload(100, 512, 256, True, 64, 2, 5)
    assert (job.batches, job.weight_format, job.streams) == ((16,), "int8", 256)
    captured = capsys.readouterr()
    assert "100 requests at once, 512 in / 256 out on average, after 64 shared by 2 group(s), seed 5" in captured.out
    rows = cells(captured.out)
    assert ["paceline", "int8", "250.0", "750.0", "8.00", "12.50", "1,375.0", "420.0", "60%"] in rows
    assert ["paceline", "int8", "16", "1,024.0", "15.62", "5,500.0", "430.1", "238%"] in rows
    assert ["paceline", "int8", "4.50", "16.000"] in rows
    assert "3,000 GB/s read, 700.0 TFLOP/s" in " ".join(captured.out.split())
    assert captured.err == ""


def test_throughput_of_decodes_only_as_json(batch_workers: list[BatchJob], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", "llama-3.1-8b", "--decode-only", "--batch", "4", "--json", "-", "--quiet"]) == 0
    assert batch_workers[0].workload is None
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][0]["batch"] == 4
    assert found["rows"][0]["rate"] == 256
    assert found["workload"] is None


def test_throughput_that_cannot_be(batch_workers: list[BatchJob], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", "--decode-only"]) == 2
    assert "nothing to measure" in capsys.readouterr().err
    assert main(["bench", "throughput", "--json", "/no/such/place/x.json"]) == 2
    assert "there is no such directory" in capsys.readouterr().err
    assert not batch_workers
    assert main(["bench", "throughput", "--against", "transformers", "--quiet"]) == 1
    assert "not measured: transformers dense: no transformers here" in capsys.readouterr().err
