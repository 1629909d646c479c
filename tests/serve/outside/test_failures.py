"""An engine that is killed or stopped and a server that is told to end, seen through HTTP."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

BODY = {"max_tokens": 480, "ignore_eos": True}


def test_kill_9_of_the_engine_in_the_middle(shared_server):
    """Each client gets the rest from the next engine, or an error, within 5 s; then the server is ready by itself."""
    server = shared_server
    prompts = [f"{number} hello" for number in range(8)]
    expected = [server.complete(prompt, **BODY).json() for prompt in prompts]
    texts = [answer["choices"][0]["text"] for answer in expected]
    old = server.engine_pid
    readings = [server.reading(prompt, **BODY) for prompt in prompts]
    with ThreadPoolExecutor(len(readings) + 1) as pool:
        futures = [pool.submit(reading.read) for reading in readings]
        whole = pool.submit(server.complete, **BODY)
        for reading in readings:
            assert reading.begun.wait(30)
        os.kill(old, signal.SIGKILL)
        assert server.is_live
        for future, text in zip(futures, texts, strict=True):
            reading = future.result(60)
            assert reading.longest_wait < 5
            if "error" in reading.last:
                assert reading.last["error"]["type"] == "server_error"
                assert text.startswith(reading.text)
            else:
                assert reading.text == text
        assert whole.result(60).status_code in (200, 503)
    server.wait_for(lambda: server.is_ready, 60)
    assert server.engine_pid not in (old, None)
    assert server.complete(prompts[0], **BODY).json()["choices"] == expected[0]["choices"]
    server.wait_until_idle()


def test_a_stopped_engine_is_live_and_not_ready(shared_server):
    server = shared_server
    engine = server.engine_pid
    reading = server.reading(**BODY)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(reading.read)
        assert reading.begun.wait(30)
        os.kill(engine, signal.SIGSTOP)
        try:
            assert server.wait_for(lambda: not server.is_ready, 10) < 5
            assert server.is_live
            refused = server.complete()
            assert refused.status_code == 503
            assert "nothing was heard of the engine" in refused.json()["error"]["message"]
            assert int(refused.headers["retry-after"]) >= 1
        finally:
            os.kill(engine, signal.SIGCONT)
        server.wait_for(lambda: server.is_ready)
        assert future.result(60).last["choices"][0]["finish_reason"] == "length"
    assert server.engine_pid == engine
    server.wait_until_idle()


def test_sigterm_lets_what_runs_finish_and_nothing_else_in(serve, tiny_arguments):
    with serve(*tiny_arguments) as server, ThreadPoolExecutor(2) as pool:
        engine = server.engine_pid
        reading = server.reading(["hello", "you"], **BODY)
        streamed = pool.submit(reading.read)
        whole = pool.submit(server.complete, ["hello", "you"], **BODY)
        assert reading.begun.wait(30)
        server.wait_for(lambda: server.gauge("paceline_request_answers_count") == 4)
        server.process.send_signal(signal.SIGTERM)
        refused = server.complete()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert server.is_live
        assert not server.is_ready
        assert streamed.result(60).last["choices"][0]["finish_reason"] == "length"
        assert {choice["finish_reason"] for choice in whole.result(60).json()["choices"]} == {"length"}
        assert server.process.wait(20) == 0
        assert not os.path.exists(f"/proc/{engine}")
        assert "Traceback" not in server.log.read_text()
