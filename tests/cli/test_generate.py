"""`paceline generate` on the real default model, as a process: streams, figures, errors, interrupts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paceline.cli.app import main

pytestmark = pytest.mark.default_model

SKY = "Why is the sky blue?"
GREEDY = ("--temperature", "0", "--max-tokens", "12")


@pytest.fixture(scope="module")
def greedy(paceline, default_model_gguf):
    start = time.monotonic()
    process = paceline("generate", SKY, *GREEDY, "--json")
    seconds = time.monotonic() - start
    assert process.returncode == 0, process.stderr
    return {**json.loads(process.stdout), "process_seconds": seconds}


def test_the_answer_is_alone_on_stdout_and_the_figures_on_stderr(greedy, capsys):
    assert main(["generate", SKY, *GREEDY]) == 0
    captured = capsys.readouterr()
    assert captured.out == greedy["text"] + "\n"
    assert re.fullmatch(
        r"smollm2-135m float32 cpu · 36 \+ 12 tokens · TTFT \d+\.\d\d s · [\d.]+ tokens/s · [\d.]+ of [\d.]+ GB/s "
        r"\(MBU \d+%\) · cut off by --max-tokens 12\n",
        captured.err,
    ), captured.err


def test_json_has_the_figures_the_parameters_and_their_sources(greedy):
    assert greedy["implementation"] == "paceline"
    assert len(greedy["token_ids"]) == 12
    assert greedy["prompt_tokens"] == 36
    assert (greedy["model"], greedy["dtype"], greedy["device"]) == ("smollm2-135m", "float32", "cpu")
    assert (greedy["finish_reason"], greedy["stop_reason"]) == ("length", None)
    params = greedy["sampling_params"]
    assert params["temperature"] == {"value": 0.0, "source": "request"}
    assert params["max_tokens"] == {"value": 12, "source": "request"}
    assert params["top_p"] == {"value": 1.0, "source": "default"}
    # 135 M float32 weights a token: 0.538 GB, and a little cache.
    bytes_a_token = greedy["bytes_per_second"] / greedy["tokens_per_second"]
    assert 0.53e9 < bytes_a_token < 0.56e9
    assert greedy["mbu"] == pytest.approx(greedy["bytes_per_second"] / greedy["device_bytes_per_second"])
    assert 0 < greedy["ttft_seconds"] < 60
    phases = greedy["phases"]
    named = ["import", "device", "resolve", "tokenizer", "weights", "cache", "first token"]
    assert [name for name in phases if name != "import" or sys.platform == "linux"] == named[sys.platform != "linux" :]
    assert all(seconds > 0 for seconds in phases.values())
    assert phases["first token"] >= greedy["ttft_seconds"]
    assert greedy["load_seconds"] + greedy["ttft_seconds"] < sum(phases.values()) < greedy["process_seconds"]


def test_raw_reads_stdin_seeds_repeat_and_quiet_is_quiet(paceline, default_model_gguf, capsys):
    flags = ("--raw", "--quiet", "--seed", "3", "--temperature", "1", "--max-tokens", "8")
    piped = paceline("generate", "-", *flags, stdin="Once upon a time\n")
    assert (piped.returncode, piped.stderr) == (0, "")
    assert main(["generate", "Once upon a time", *flags, "--speculative", "ngram"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert captured.out == piped.stdout
    assert captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--model", "smollm2-135n"], 1, "did you mean 'smollm2-135m'?"),
        (["--model", "/no/such/model.gguf"], 1, "/no/such/model.gguf"),
        (["--device", "cuda:99"], 2, "device 'cuda:99'"),
        (["--max-model-len", "20"], 2, "the prompt has 36 tokens and the context holds 20"),
        (["--max-model-len", "9000"], 2, "9000"),
    ],
)
def test_bad_input_is_one_line(default_model_gguf, capsys, arguments, code, says):
    assert main(["generate", SKY, *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert says in captured.err


@pytest.mark.parametrize("cut", ["header", "tensors", "garbage"])
def test_a_broken_file_is_one_line(default_model_gguf, tmp_path, capsys, cut):
    data = default_model_gguf.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes({"header": data[:1000], "tensors": data[: len(data) // 2], "garbage": b"\x00" * 4096}[cut])
    assert main(["generate", SKY, "--model", str(broken)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert "broken.gguf" in captured.err


def start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "paceline", "generate", SKY, "--max-tokens", "4000", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ))


def test_ctrl_c_ends_cleanly_in_the_middle_of_an_answer(default_model_gguf):
    process = start("--ignore-eos")
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b""


def until_torch_loads(pid: int) -> None:
    """Return as soon as the process maps torch's libraries, long before its import ends; elsewhere than on Linux, when
    that is likely. On a busy machine the interpreter itself may take a second to start."""
    maps, stop = Path(f"/proc/{pid}/maps"), time.monotonic() + 30
    if not maps.exists():
        time.sleep(0.6)
        return
    while "libtorch" not in maps.read_text():
        assert time.monotonic() < stop, "torch was never loaded"
        time.sleep(0.01)


def test_ctrl_c_ends_cleanly_while_torch_loads(default_model_gguf):
    process = start()
    until_torch_loads(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b""


def test_a_reader_that_leaves_ends_the_answer_quietly(default_model_gguf):
    with start("--ignore-eos") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == b""
