"""`paceline batch`: its answers are the server's, and a run that was killed goes on."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time

import pytest

from paceline.batch.files import open_answers, open_requests
from paceline.batch.run import run_batch
from paceline.cli.app import main
from paceline.engine.load_options import LoadOptions
from paceline.errors import EngineError
from paceline.serve.in_process import InProcessClient
from paceline.serve.service import Service
from paceline.serve.settings import ServerSettings
from paceline.serve.text import TextOptions

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat(text, **fields):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **fields}


def write(path, *requests):
    """(url, body) each, called r0, r1, ..."""
    lines = [
        json.dumps({"custom_id": f"r{index}", "method": "POST", "url": url, "body": body})
        for index, (url, body) in enumerate(requests)
    ]
    path.write_text("\n".join(lines) + "\n")


def read(path):
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(one["error"] is None and one["id"].startswith("batch_req_") for one in answers)
    assert len({one["custom_id"] for one in answers}) == len(answers)
    return {one["custom_id"]: one["response"] for one in answers}


def comparable(body):
    """Without what differs from one time to the next, the prefix cache's hits among it."""
    return {**body, "id": None, "created": None, "usage": {**body["usage"], "prompt_tokens_details": None}}


@pytest.fixture
def run(tiny_chat_model, tmp_path):
    """Answer in.jsonl into out.jsonl with an engine in this process."""

    def run(client=None, told=lambda progress: None, **options):
        made = client or InProcessClient(LoadOptions(str(tiny_chat_model), device="cpu", dtype="float32", **options))
        service = Service(made, ServerSettings(("tiny",)), TextOptions(str(tiny_chat_model)).load)
        with (
            open_requests(str(tmp_path / "in.jsonl")) as requests,
            open_answers(str(tmp_path / "out.jsonl"), {place.custom_id for place in requests.places}) as answers,
        ):
            return asyncio.run(asyncio.wait_for(run_batch(service, requests, answers, told), 30))

    return run


def test_answers_are_the_servers_own(server, run, tmp_path):
    requests = [
        (CHAT, chat("hello")),
        (CHAT, chat("hello", n=3, temperature=1, seed=5, model="tiny")),
        (COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 4, "temperature": 0}),
        (CHAT, chat("hello", temperature=-1)),
        (CHAT, chat("hello", model="gpt-4o")),
        (CHAT, {"messages": []}),
        ("/v1/nothing", {"input": "x"}),
        (CHAT, [1]),
    ]
    write(tmp_path / "in.jsonl", *requests)
    seen = []
    progress = run(told=lambda progress: seen.append((progress.num_answers, progress.num_tokens)))
    answers = read(tmp_path / "out.jsonl")
    statuses = []
    for index, (url, body) in enumerate(requests):
        expected = server.post(url, body)
        found = answers[f"r{index}"]
        assert found["status_code"] == expected.status_code
        assert found["request_id"].startswith("req-")
        theirs = expected.json()
        if expected.status_code == 200:
            assert comparable(found["body"]) == comparable(theirs)
        else:
            names = json.dumps(theirs).replace("tiny, tiny-alias", "tiny")
            assert json.dumps(found["body"]) == names
        statuses.append(found["status_code"])
    assert statuses == [200, 200, 200, 400, 404, 400, 404, 400]
    assert [count for count, _ in seen] == list(range(1, 9))
    assert progress.num_tokens == sum(
        one["body"].get("usage", {}).get("completion_tokens", 0) for one in answers.values()
    )


def test_streams_are_refused(run, tmp_path):
    write(tmp_path / "in.jsonl", (CHAT, chat("hello", stream=True)), (CHAT, chat("hello", stream=False)))
    run()
    answers = read(tmp_path / "out.jsonl")
    assert answers["r0"]["status_code"] == 400
    assert answers["r0"]["body"]["error"]["param"] == "stream"
    assert answers["r1"]["status_code"] == 200


def test_many_more_requests_than_the_engine_takes_at_once(run, tmp_path):
    from paceline.config import SchedulerConfig

    write(tmp_path / "in.jsonl", *((CHAT, chat(f"number {index}")) for index in range(40)))
    run(scheduler=SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=64))
    answers = read(tmp_path / "out.jsonl")
    assert len(answers) == 40
    assert all(one["status_code"] == 200 for one in answers.values())


def test_what_is_answered_is_not_asked_again(run, tmp_path):
    write(tmp_path / "in.jsonl", (CHAT, chat("one")), (CHAT, chat("two")))
    run()
    first, second = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_text(first + second[:40])
    assert run().num_answers == 1
    lines = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
    assert lines[0] == first
    assert json.loads(lines[1])["response"]["body"]["choices"] == json.loads(second)["response"]["body"]["choices"]


class Dying(InProcessClient):
    """Takes no request until it was asked `refusals` times."""

    refusals = 2
    comes_back = True

    async def submit(self, request):
        from paceline.errors import EngineDeadError

        if self.refusals:
            self.refusals -= 1
            if not self.comes_back:
                self._fail("the engine died")
            raise EngineDeadError("the engine died")
        return await super().submit(request)


def test_an_engine_that_comes_back_answers_what_it_had_dropped(run, tiny_chat_model, tmp_path):
    write(tmp_path / "in.jsonl", (CHAT, chat("one")))
    run(Dying(LoadOptions(str(tiny_chat_model), device="cpu")))
    assert read(tmp_path / "out.jsonl")["r0"]["status_code"] == 200


def test_a_request_that_no_engine_outlives_has_its_error(run, tiny_chat_model, tmp_path):
    write(tmp_path / "in.jsonl", (CHAT, chat("one")))
    client = Dying(LoadOptions(str(tiny_chat_model), device="cpu"))
    client.refusals = 1000
    run(client)
    response = read(tmp_path / "out.jsonl")["r0"]
    assert response["status_code"] == 503
    assert response["body"]["error"]["code"] == "engine_unavailable"
    assert client.refusals == 1000 - 3


def test_an_engine_that_is_dead_ends_the_run_and_answers_nothing_for_it(run, tiny_chat_model, tmp_path):
    write(tmp_path / "in.jsonl", (CHAT, chat("one")))
    client = Dying(LoadOptions(str(tiny_chat_model), device="cpu"))
    client.comes_back = False
    with pytest.raises(EngineError, match="run the same command again"):
        run(client)
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_a_run_that_is_killed_goes_on(tiny_chat_model, tmp_path, capsys):
    """kill -9 after some answers, then the same command: each is answered once, and refused ones make it fail."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests = [(CHAT, chat(f"number {index}", max_tokens=40, ignore_eos=True)) for index in range(30)]
    write(source, *requests, (CHAT, chat("x", top_p=7)))
    command = ["batch", str(source), str(target), "--model", str(tiny_chat_model)]
    command += ["--max-num-seqs", "2", "--threads", "1"]
    first = subprocess.Popen([sys.executable, "-m", "paceline", *command, "--quiet"])
    end = time.monotonic() + 60
    while not target.exists() or target.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < end
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    there = target.read_bytes()
    there = there[: there.rindex(b"\n") + 1]
    assert main(command) == 1
    assert target.read_bytes().startswith(there)
    assert len(read(target)) == 31
    left = 31 - there.count(b"\n")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(f": {left} of 31 requests to answer")
    assert lines[-2].startswith(f"{left} answers, ")
    assert lines[-1] == f"error: 1 requests were refused or failed; {target} says why"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["no.jsonl", "out.jsonl"], 2, "no.jsonl cannot be read"),
        (["in.jsonl", "./in.jsonl"], 2, "is the file of the requests"),
        (["in.jsonl"], 2, "Missing argument 'OUT.jsonl'"),
    ],
)
def test_what_cannot_be_right(tmp_path, capsys, monkeypatch, arguments, code, says):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", (CHAT, chat("one")))
    assert main(["batch", *arguments, "--quiet"]) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_nothing_is_loaded_where_all_is_answered(run, tmp_path, capsys):
    write(tmp_path / "in.jsonl", (CHAT, chat("one")))
    run()
    files = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
    assert main(["batch", *files, "--model", "/no/such/model"]) == 0
    assert "all 1 requests are answered" in capsys.readouterr().err
