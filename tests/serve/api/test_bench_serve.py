"""`paceline bench serve` against a real server: its figures, its files, and what it refuses."""

from __future__ import annotations

import json
import socket

import pytest

from paceline.cli.app import main

SMALL = ["--requests", "6", "--input-len", "150", "--output-len", "5", "--warmup", "1"]


def test_two_rates(server, capsys, tmp_path):
    path = tmp_path / "figures.json"
    rates = ["--rate", "100", "--rate", "inf", "--goodput", "ttft:60000"]
    before = server.service.client.status().counters
    assert main(["bench", "serve", server.url, *SMALL, *rates, "--json", str(path), "--seed", "3"]) == 0
    after = server.service.client.status().counters
    captured = capsys.readouterr()
    assert "tiny at http://127.0.0.1" in captured.out
    assert "warming up with 1 requests" in captured.err
    report = json.loads(path.read_text())
    assert report["counted_by_server"]
    assert report["scale"]["per_word"] > 4  # this model's tokens are bytes
    assert [one["rate"] for one in report["rounds"]] == [100, None]
    for one in report["rounds"]:
        assert (one["num_requests"], one["num_failed"], one["good_share"]) == (6, 0, 1)
        assert one["output_tokens"] == 30
        assert one["prompt_tokens"] / 6 == pytest.approx(150, rel=0.2)
        assert 0 < one["ttft"]["p50"] <= one["latency"]["p50"]
        assert len({tuple(outcome["times"]) for outcome in one["outcomes"]}) == 6
    assert after.requests - before.requests == 2 + 1 + 2 * 6
    assert after.generation_tokens - before.generation_tokens == 2 + 5 + 2 * 30
    assert after.prefix_hit_tokens == before.prefix_hit_tokens  # no prompt is another's, of whatever round
    rows = [line.split() for line in captured.out.splitlines()]
    assert [row[0] for row in rows if row[2:4] == ["6", "0"]] == ["100", "inf"]


def test_lengths_that_are_drawn_and_a_json_alone(server, capsys):
    assert main(["bench", "serve", server.url, *SMALL, "--mixed", "--json", "-", "--quiet", "--output-len", "30"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    (one,) = json.loads(captured.out)["rounds"]
    assert len({outcome["prompt_tokens"] for outcome in one["outcomes"]}) > 3
    assert len({outcome["output_tokens"] for outcome in one["outcomes"]}) > 1


def test_a_figure(server, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "figure.svg"
    assert main(["bench", "serve", server.url, *SMALL, "--plot", str(path), "--quiet"]) == 0
    assert path.read_text().count("<svg") == 1


def test_requests_that_fail_are_counted_by_what_was_said(serving, capsys):
    long = ["--requests", "4", "--input-len", "300", "--output-len", "150", "--mixed", "--warmup", "0"]
    with serving() as server:  # whose context of 512 holds no prompt of 400 beside an answer of 200
        assert main(["bench", "serve", server.url, *long, "--quiet", "--seed", "1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "failed 400: the prompt has" in out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--model", "nobody"], 2, "/v1/chat/completions answers 404: the model 'nobody' is not served here"),
        (["--input-len", "900"], 1, "none of 1 requests was answered; the first: 400: "),
        (["--goodput", "ttft"], 2, "--goodput 'ttft'"),
        (["--rate", "0"], 2, "'0' is no rate"),
        (["--requests", "0"], 2, "num requests must be at least 1"),
        (["--json", "/no/such/directory/x.json"], 2, "there is no such directory"),
    ],
)
def test_what_cannot_be_right(server, capsys, arguments, code, says):
    assert main(["bench", "serve", server.url, *SMALL, "--quiet", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert says in captured.err


def test_a_server_with_a_key(serving, capsys):
    with serving(api_keys=("secret",)) as server:
        assert main(["bench", "serve", server.url, *SMALL, "--quiet"]) == 2
        assert "answers 401" in capsys.readouterr().err
        assert main(["bench", "serve", server.url, *SMALL, "--json", "-", "--api-key", "secret"]) == 0
    assert "secret" not in capsys.readouterr().out


def test_nobody_there(capsys):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    assert main(["bench", "serve", f"127.0.0.1:{port}"]) == 1
    assert f"http://127.0.0.1:{port} cannot be asked: " in capsys.readouterr().err
