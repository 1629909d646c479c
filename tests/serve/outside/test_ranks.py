"""A server whose model is split over processes, seen through HTTP and from the shell that started it."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

LONG = {"max_tokens": 160, "ignore_eos": True}


def gone(pid: int) -> bool:
    """Within a second, in which a process notices that its parent ended."""
    deadline = time.monotonic() + 2
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.01)
    return not os.path.exists(f"/proc/{pid}")


def test_a_split_model_answers_as_a_whole_one_outlives_a_rank_and_leaves_no_process(
    serve, shared_server, tiny_arguments
):
    prompts = [f"{number} hello" for number in range(4)]
    expected = shared_server.complete(prompts, **LONG).json()["choices"]
    texts = [choice["text"] for choice in expected]
    with serve(*tiny_arguments, "--tensor-parallel-size", "2") as server, ThreadPoolExecutor(len(prompts)) as pool:
        first = [server.engine_pid, *server.rank_pids]
        assert len(first) == 3
        readings = [server.reading(prompt, **LONG) for prompt in prompts]
        futures = [pool.submit(reading.read) for reading in readings]
        for reading in readings:
            assert reading.begun.wait(30)
        os.kill(first[2], signal.SIGKILL)
        for future, text in zip(futures, texts, strict=True):
            reading = future.result(60)
            if "error" in reading.last:
                assert text.startswith(reading.text)
            else:
                assert reading.text == text
        server.wait_for(lambda: server.is_ready, 60)
        assert "rank 1 of 2 (pid" in server.log.read_text()
        assert "Traceback" not in server.log.read_text()
        assert all(map(gone, first))
        second = [server.engine_pid, *server.rank_pids]
        assert len(second) == 3
        assert server.complete(prompts, **LONG).json()["choices"] == expected
        # As a service manager ends a service: every process of it is told, and what runs finishes.
        reading = server.reading(prompts[0], **LONG)
        future = pool.submit(reading.read)
        assert reading.begun.wait(30)
        for pid in [*second, server.process.pid]:
            os.kill(pid, signal.SIGTERM)
        assert future.result(60).text == texts[0]
        assert server.process.wait(20) == 0
        assert all(map(gone, second))
