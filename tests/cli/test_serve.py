"""`paceline serve` from the outside: its options, what it refuses, and a server that starts, answers and ends."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import click
import httpx
import pytest

import paceline.cli.app as app
from paceline.cli.app import commands
from paceline.cli.load_options import load_options
from paceline.cli.serve_options import ENVIRONMENT
from paceline.config import ParallelConfig
from paceline.errors import PacelineError
from paceline.serve.admission import QueueLimits


def refused(arguments, capsys, monkeypatch=None):
    code = app.main(["serve", *arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    return code, captured.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prot", "8000"], "did you mean '--port'?"),
        (["--port", "99999"], "--port"),
        (["--port", "eighty"], "not a valid int"),
        (["a", "--model", "b"], "two models: 'a' and --model 'b'"),
        (["--enforce-eager", "--mode", "compile"], "contradict each other"),
        (["-tp", "0"], "--tensor-parallel-size"),
        (["-pp", "two"], "--pipeline-parallel-size"),
        (["-tp", "2", "--deterministic"], "deterministic is of one device"),
        (["-pp", "2", "--offload", "host"], "offload='host' streams to one device"),
        (["--deterministic", "--mode", "graph"], "leave out mode='graph'"),
        (["--trust-remote-code"], "runs no code from a checkpoint"),
        (["--api-key", ""], "--api-key is empty"),
        (["--load-format", "dummy"], "name one with --tokenizer"),
        (["--speculative-config", "{"], "is not JSON"),
        (["--speculative-config", "[]"], "is not a JSON object"),
        (["--speculative-config", '{"methud": "ngram"}'], "did you mean 'method'?"),
        (["--max-num-seqs", "4096"], "max_num_batched_tokens (2048) must be at least max_num_seqs (4096)"),
        (["--config", "/no/such.yaml"], "No such file"),
        (["--ssl-keyfile", "k.pem"], "--ssl-keyfile needs --ssl-certfile"),
        (["--ssl-certfile", "/no/such.pem"], "cannot be used"),
        (["--chat-template", "/no/such.jinja"], "'/no/such.jinja' is neither a Jinja template nor a readable file"),
        (["--chat-template", "{{ messages"], "the chat template does not compile: line 1"),
        (["--host", "no.such.host.invalid"], "is not an address of this machine"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(arguments, says, capsys):
    code, line = refused(arguments, capsys)
    assert code == 2
    assert says in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("port: [", "is not YAML"),
        ("- port", "must hold options by name"),
        ("prot: 8000", "did you mean 'port'?"),
        ("port: [1, 2]", "port takes one value"),
        ("port: eighty", "not a valid int"),
    ],
)
def test_a_config_file_that_cannot_be_right(text, says, capsys, tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    code, line = refused(["--config", str(path)], capsys)
    assert code == 2
    assert says in line


def parsed(*arguments):
    """The options as the command would have them."""
    with commands.commands["serve"].make_context("serve", list(arguments)) as context:
        return context.params


def test_flags_come_before_the_environment_and_that_before_the_file(tmp_path, monkeypatch):
    path = tmp_path / "serve.yaml"
    path.write_text("port: 1\nhost: file\nmax-num-seqs: 2\nserved_model_name: [a, b]\nallowed-origins: [x, y]\nseed: 3")
    monkeypatch.setenv("PACELINE_SERVE_HOST", "environment")
    monkeypatch.setenv("PACELINE_SERVE_PORT", "5")
    options = parsed("--config", str(path), "--port", "9")
    assert options["port"] == 9
    assert options["host"] == "environment"
    assert options["max_num_seqs"] == 2
    assert options["served_model_name"] == ("a", "b")
    assert options["allowed_origins"] == ("x", "y")
    assert options["seed"] == 3


def test_every_option_has_its_variable(monkeypatch):
    command = commands.commands["serve"]
    with command.make_context("serve", []) as context:
        for option in command.params:
            if isinstance(option, click.Option):
                flags = {flag[2:].replace("-", "_") for flag in option.opts if flag.startswith("--")}
                assert option.name in flags
                monkeypatch.setenv(f"{ENVIRONMENT}_{option.name.upper()}", "value")
                assert option.resolve_envvar_value(context) == "value"


def test_vllms_flags_are_taken():
    flags = "--quantization int8 --max-num-queued-reqs 7 --max-num-queued-tokens 8 --no-enable-prefix-caching"
    options = parsed(
        *flags.split(" "),
        *("--generation-config", "vllm", "--allowed-origins", '["a", "b"]'),
        *("--speculative-config", '{"method": "ngram"}'),
    )
    assert options["quantization"] == "int8"
    assert (options["max_queue"], options["max_queue_tokens"]) == (7, 8)
    assert options["enable_prefix_caching"] is False
    assert options["allowed_origins"] == ("a", "b")
    assert options["speculative_config"] == {"method": "ngram"}


def test_a_port_in_use_is_told_before_anything_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, line = refused(["--model", "/no/such/model", "--port", str(port)], capsys)
    assert code == 1
    assert line == f"error: port {port} is in use on 127.0.0.1: end what listens there, or choose another --port\n"


@pytest.mark.parametrize(("flags", "level"), [([], logging.WARNING), (["--debug"], logging.DEBUG)])
def test_what_the_engine_is_started_with(monkeypatch, capsys, flags, level):
    from paceline.serve import zmq_client

    seen = []

    def supervised(options, **others):
        seen.append((options, others))
        raise PacelineError("seen enough")

    monkeypatch.setattr(zmq_client, "supervised", supervised)
    given = "--max-model-len=99 --quantization=int8 --max-num-seqs=3 --max-queue=7 --threads=2 --enforce-eager --port=0"
    assert app.main(["serve", "m", *given.split(" "), "-tp", "2", "-pp", "3", *flags]) == 1
    assert capsys.readouterr().err.endswith("error: seen enough\n")
    ((options, others),) = seen
    assert (options.model, options.max_model_len, options.quantization) == ("m", 99, "int8")
    assert (options.mode, options.scheduler.max_num_seqs) == ("eager", 3)
    assert (options.parallel, options.deterministic) == (ParallelConfig(2, 3), False)
    assert others == {"limits": QueueLimits(7, None), "threads": 2, "log_level": level}


@pytest.mark.parametrize(("flags", "expected"), [([], False), (["--deterministic"], True)])
def test_the_engine_is_deterministic_where_it_was_asked_for(flags, expected):
    assert load_options(parsed(*flags)).deterministic is expected


def test_a_model_that_is_not_there_ends_the_server_with_its_error():
    process = subprocess.run(
        [sys.executable, "-m", "paceline", "serve", "/no/such/model", "--port", "0"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 1
    assert process.stdout == ""
    assert process.stderr.splitlines()[-1].startswith("error: /no/such/model: no such file"), process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.default_model
def test_it_serves_drains_on_sigterm_and_exits_with_0(default_model_gguf: Path, free_port: int):
    url = f"http://127.0.0.1:{free_port}"
    command = [sys.executable, "-m", "paceline", "serve", "--port", str(free_port), "--served-model-name", "smol"]
    process = subprocess.Popen([*command, "--max-model-len", "512"], stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                if httpx.get(url + "/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() < end
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.05)
        maps = Path(f"/proc/{process.pid}/maps")
        if maps.exists():
            assert "libtorch" not in maps.read_text()  # the engine's process has it
        body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 30, "temperature": 0}
        with httpx.stream(
            "POST", url + "/v1/chat/completions", json={**body, "stream": True, "ignore_eos": True}, timeout=60
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port
