"""What the API side of `paceline serve` costs a token: one API process before an engine whose model takes no time.

    python benchmarks/serve_overhead.py                           200 streams of 1,000 tokens, one API process
    python benchmarks/serve_overhead.py --rate 15000 --clients 8

The engine's process is the real one, scheduler and all, but for its model: each step's tokens are there at once, and
say which step they are of. First it runs as fast as it can, which gives the tokens a second of the API process and the
CPU it takes for one; then its steps come at a pace that gives `--rate` tokens a second, which gives how much later a
token reaches a client than its step ended. Server, engine and clients are processes of one machine and share its
clock: fewer cores than processes measure each other.

Beside it, as the least that one thread can do: a process without engine, HTTP or JSON, which at the same pace sends the
same bytes, made beforehand, to as many sockets, one system call a token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import socket
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np

STEPS = 16384  # that a token can tell apart
WORD = re.compile(rb"w(\d{5})")
CHUNK = (  # as one of paceline's, of as many bytes
    b'data: {"id":"chatcmpl-00000000000000000000000000000000","object":"chat.completion.chunk","created":1700000000,'
    b'"model":"instant","choices":[{"index":0,"delta":{"content":" %s"},"logprobs":null,"finish_reason":null}]}\n\n'
)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


# ------------------------------------------------------------------------------------------------------ the model


def write_model(directory: Path, streams: int) -> None:
    """A model that is never run, and the words that its tokens are: " w00000", " w00001", ..."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from paceline.benchmark.directory import write_directory

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"Ġw{step:05d}" for step in range(STEPS))]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
        "vocab_size": len(words),
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    write_directory(config, directory)
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def run_instant_engine(step_seconds: float, times: str, spec: Any, addresses: Any) -> None:
    """As serve.engine_process.run_engine_process. A step of decodes ends `step_seconds` after the last one, and when
    that was, in seconds of time.monotonic(), is written to the file `times`."""
    from paceline.engine.model_runner import Launched, ModelRunner
    from paceline.engine.step import SchedulerOutput, StepOutput
    from paceline.serve.engine_process import run_engine_process

    log = open(times, "wb", buffering=0)  # noqa: SIM115  # for as long as the process lives
    step, due = 0, 0.0

    def launch(self: ModelRunner, output: SchedulerOutput) -> Launched:
        nonlocal step, due
        token = 256 + step % STEPS
        now = time.monotonic()
        due = max(now, due + step_seconds)
        if due > now:
            time.sleep(due - now)
        log.write(np.float64(time.monotonic()).tobytes())
        step += 1
        return Launched(StepOutput({one.request_id: (token,) for one in output.scheduled if one.samples}))

    ModelRunner.launch = launch  # type: ignore[method-assign]
    run_engine_process(spec, addresses)


# ----------------------------------------------------------------------------------------------------- the server


def run_api(directory: Path, streams: int, step_seconds: float, times: str, ready: Connection) -> None:
    """One API process, as `paceline serve` is one; its port is sent once it takes requests."""
    from paceline.config import CacheConfig, SchedulerConfig
    from paceline.engine.load_options import LoadOptions
    from paceline.serve.server import ListenOptions, listen, run_server
    from paceline.serve.service import Service
    from paceline.serve.settings import ServerSettings
    from paceline.serve.text import TextOptions
    from paceline.serve.zmq_client import ZmqClient, supervised

    options = LoadOptions(
        str(directory),
        device="cpu",
        cache=CacheConfig(16, streams * STEPS // 64, True),
        scheduler=SchedulerConfig(streams, max(2048, streams)),
    )
    client = ZmqClient(partial(supervised(options, threads=1), target=partial(run_instant_engine, step_seconds, times)))
    where = ListenOptions(port=0)
    listener = listen(where)
    port = listener.getsockname()[1]
    service = Service(
        client, ServerSettings(("instant",)), TextOptions(str(directory)).load, lambda info: ready.send(port)
    )
    run_server(service, where, listener)


def run_sends_alone(directory: Path, streams: int, step_seconds: float, times: str, ready: Connection) -> None:
    """In place of `run_api`: nothing but the system calls that give each stream its token of each step."""
    log = open(times, "wb", buffering=0)  # noqa: SIM115  # for as long as the process lives
    listener = socket.create_server(("127.0.0.1", 0), backlog=streams)
    ready.send(listener.getsockname()[1])
    step = 0
    while True:  # a round of clients
        sockets, tokens = [], 0
        for _ in range(streams):
            connection = listener.accept()[0]
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tokens = json.loads(connection.recv(65536).partition(b"\r\n\r\n")[2])["max_tokens"]
            sockets.append(connection)
        due = 0.0
        for _ in range(tokens):
            event = CHUNK % b"w%05d" % (step % STEPS)
            chunk = b"%x\r\n" % len(event) + event + b"\r\n"
            due = max(time.monotonic(), due + step_seconds)
            time.sleep(max(0.0, due - time.monotonic()))
            log.write(np.float64(time.monotonic()).tobytes())
            step += 1
            for connection in sockets:
                connection.send(chunk)
        for connection in sockets:
            connection.send(b"data: [DONE]\n\n")
            connection.close()


# ---------------------------------------------------------------------------------------------------- the clients


class Stream(asyncio.Protocol):
    """One streamed answer. What arrives is kept with its time, and looked at when all is over."""

    def __init__(self, tokens: int, ended: asyncio.Future[None]) -> None:
        self._body = json.dumps(
            {
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
        )
        self._ended = ended
        self._tail = b""
        self.pieces: list[bytes] = []
        self.times: list[float] = []

    def connection_made(self, transport: Any) -> None:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(self._body)}\r\n\r\n"
        transport.write((head + self._body).encode())

    def data_received(self, data: bytes) -> None:
        self.times.append(time.monotonic())
        self.pieces.append(data)
        self._tail = (self._tail + data)[-64:]
        if b"[DONE]" in self._tail and not self._ended.done():
            self._ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_exception(error or ConnectionError(b"".join(self.pieces)[:500].decode()))

    def arrivals(self) -> list[tuple[int, float]]:
        """The step of each token, and when the last byte of it came."""
        ends = list(accumulate(map(len, self.pieces)))
        found = WORD.finditer(b"".join(self.pieces))
        return [(int(one.group(1)), self.times[bisect_left(ends, one.end())]) for one in found]


def read_streams(port: int, streams: int, tokens: int, go: Any, results: Connection) -> None:
    """A client process: that many streams at once, begun when all client processes are there."""
    import uvloop

    async def one(loop: asyncio.AbstractEventLoop) -> Stream:
        ended = loop.create_future()
        transport, stream = await loop.create_connection(lambda: Stream(tokens, ended), "127.0.0.1", port)
        await ended
        transport.close()
        return stream

    async def every() -> list[Stream]:
        loop = asyncio.get_running_loop()
        go.wait()
        return await asyncio.gather(*(one(loop) for _ in range(streams)))

    streams_read = uvloop.new_event_loop().run_until_complete(every())
    results.send([stream.arrivals() for stream in streams_read])


# ----------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Measured:
    tokens_per_second: float
    user_us: float  # CPU of the API process, a token
    system_us: float
    added_ms: tuple[float, float, float]  # from a step's end to a client: p50, p90, p99


def measure(
    serve: Callable[..., None], directory: Path, streams: int, tokens: int, clients: int, rate: float | None
) -> Measured:
    """`rate`: tokens a second that the engine gives at most; None: as many as it can. `serve`: the server's process."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.NamedTemporaryFile() as times:
        here, there = spawn.Pipe(duplex=False)
        step_seconds = 0.0 if rate is None else streams / rate
        api = spawn.Process(target=serve, args=(directory, streams, step_seconds, times.name, there))
        api.start()
        try:
            if not here.poll(120):
                raise RuntimeError("the server did not start")
            port = here.recv()
            run_clients(port, streams, 20, clients)  # a first round warms up
            begun = cpu_seconds(api.pid)
            arrivals = run_clients(port, streams, tokens, clients)
            user, system = (after - before for before, after in zip(begun, cpu_seconds(api.pid), strict=True))
            steps = np.fromfile(times.name)
        finally:
            api.terminate()
            api.join()
    counts = [len(one) for one in arrivals]
    if counts != [tokens] * streams:
        raise RuntimeError(f"asked for {tokens} tokens a stream and got {min(counts)} to {max(counts)}")
    first, last = min(one[0][1] for one in arrivals), max(one[-1][1] for one in arrivals)
    added = [1e3 * float(at - steps[step]) for one in arrivals for step, at in one[1:]]
    total = streams * tokens
    return Measured(total / (last - first), 1e6 * user / total, 1e6 * system / total, percentiles(added))


def run_clients(port: int, streams: int, tokens: int, clients: int) -> list[list[tuple[int, float]]]:
    spawn = multiprocessing.get_context("spawn")
    go, pipes, processes = spawn.Barrier(clients), [], []
    for number in range(clients):
        here, there = spawn.Pipe(duplex=False)
        share = streams // clients + (number < streams % clients)
        process = spawn.Process(target=read_streams, args=(port, share, tokens, go, there))
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    arrivals = [stream for pipe in pipes for stream in pipe.recv()]
    for process in processes:
        process.join()
    return arrivals


def cpu_seconds(pid: int | None) -> tuple[float, float]:
    """In the process itself, and in the kernel for it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / ticks, int(fields[12]) / ticks


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    cuts = quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[89], cuts[98]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=1000, help="of each stream")
    parser.add_argument("--rate", type=float, default=15000, help="tokens a second of the paced run")
    parser.add_argument("--clients", type=int, default=4, help="processes that read the streams")
    options = parser.parse_args()
    if 2 * (options.tokens + 50) > STEPS:
        parser.error(f"--tokens must be below {STEPS // 2 - 50}: a token tells so many steps apart")
    print(f"{options.streams} streams of {options.tokens} tokens, {options.clients} clients, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), options.streams)
        paced = f"{options.rate:.0f} tokens/s"
        for name, serve, rate in (
            ("as fast as it can", run_api, None),
            (paced, run_api, options.rate),
            (f"{paced}, the sends alone", run_sends_alone, options.rate),
        ):
            got = measure(serve, Path(folder), options.streams, options.tokens, options.clients, rate)
            print(
                f"{name}: {got.tokens_per_second:.0f} tokens/s, a token {got.user_us:.1f} us of CPU and "
                f"{got.system_us:.1f} in the kernel, "
                "added p50 {:.2f} ms, p90 {:.2f}, p99 {:.2f}".format(*got.added_ms),
                flush=True,
            )


if __name__ == "__main__":
    main()
