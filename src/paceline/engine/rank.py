"""One rank: a process that holds its part of the model and runs each step that the driver sends it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore

from paceline.config import DecoderConfig, EngineConfig
from paceline.engine.build import load_part
from paceline.engine.engine import Launched, Runner
from paceline.engine.graphs import step_choices
from paceline.engine.load_options import LoadOptions
from paceline.engine.memory import Sizes
from paceline.engine.model_runner import ModelRunner
from paceline.engine.wire import Receiver
from paceline.kernels.choices import Choice
from paceline.parallel.communicator import connect
from paceline.parallel.processes import failure_of
from paceline.parallel.split import Rank
from paceline.phases import Phases


@dataclass(frozen=True)
class Job:
    """What the driver tells a rank first. `port`: of the store where the ranks meet; `threads`: torch's, on the CPU;
    `level`: of its log."""

    rank: Rank
    options: LoadOptions
    port: int
    threads: int
    level: int


@dataclass(frozen=True)
class Facts:
    """What must be alike on all ranks, and the device's name and memory, which should be."""

    versions: tuple[tuple[str, str], ...]
    device: str
    memory: int


@dataclass(frozen=True)
class Part:
    """What a rank has loaded, in figures."""

    engine_config: EngineConfig
    config: DecoderConfig
    num_blocks: tuple[int, ...]
    dtype: torch.dtype
    step_weight_bytes: int
    kv_bytes_per_token: int
    sizes: Sizes
    load_peak: int
    phases: dict[str, float]


def main(connection: Connection[Any, Any]) -> None:
    """Serve the driver until it closes the pipe; a failure is told and ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to decide upon
    _end_with(os.getppid())
    code = 0
    try:
        _serve(connection)
    except EOFError:
        pass  # the driver is done
    except BaseException as error:
        code = 1
        connection.send(failure_of(error))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # groups that are taken down in order wait for ranks that may be gone


def _serve(connection: Connection[Any, Any]) -> None:
    job: Job = connection.recv()
    _configure(job)
    device = torch.device(job.options.device)
    connection.send(facts(device))
    connection.recv()  # the driver has compared them
    store = TCPStore("127.0.0.1", job.port, is_master=False, wait_for_workers=False)
    phases = Phases()
    with phases.time("connect"):
        communicator = connect(job.rank, store, device)
    loaded = load_part(job.options, communicator)
    engine, runner = loaded.engine, loaded.engine.runner
    assert isinstance(runner, ModelRunner)
    assert isinstance(loaded.config, DecoderConfig)
    assert loaded.sizes is not None  # a decoder's are planned
    connection.send(
        Part(
            engine.config,
            loaded.config,
            loaded.num_blocks,
            loaded.dtype,
            loaded.step_weight_bytes,
            loaded.kv_bytes_per_token,
            loaded.sizes,
            loaded.load_peak,
            {**phases.seconds, **loaded.phases},
        )
    )
    run_steps(
        connection,
        runner,
        engine.config.async_depth,
        lambda rows: tuple(step_choices(runner.model, engine.config, rows)),
        tells=job.rank.index == 0,
    )


def run_steps(
    connection: Connection[Any, Any],
    runner: Runner,
    async_depth: int,
    choices: Callable[[int], tuple[Choice, ...]],
    *,
    tells: bool,
) -> None:
    """Answer the driver (engine/remote.py) until it closes the pipe, which is an EOFError. One rank `tells` of what
    all do."""
    receiver, in_flight = Receiver(), deque[Launched]()
    while True:
        kind, message = connection.recv()
        if kind == "choices":
            if tells:
                connection.send(choices(message))
            continue
        launched = runner.launch(receiver.decode(message))
        in_flight.append(launched)
        done = launched.done
        if tells:
            connection.send(done)
        # As engine.Engine.step does it, which is where the driver collects them.
        while len(in_flight) > (0 if done else async_depth):
            step = runner.collect(in_flight.popleft())
            if tells:
                connection.send(step)


def _configure(job: Job) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(job.threads)
    logging.basicConfig(stream=sys.stderr, format=f"%(levelname)s: rank {job.rank.index}: %(message)s")
    # What all ranks would say alike the first one says.
    logging.getLogger("paceline").setLevel(job.level if job.rank.index == 0 else max(job.level, logging.ERROR))


def facts(device: torch.device) -> Facts:
    """This process's."""
    ours = sys.modules["paceline"].__version__  # not imported: the package's face is above this module
    versions = (("paceline", ours), ("torch", torch.__version__), ("Python", sys.version.split()[0]))
    if device.type != "cuda":
        return Facts(versions, str(device), 0)
    properties = torch.cuda.get_device_properties(device)
    return Facts(versions, properties.name, properties.total_memory)


def rank_options(options: LoadOptions, model: str, device: torch.device, rank: Rank) -> LoadOptions:
    """What a rank loads of what the driver was asked for: the files that the driver has found, no tokenizer."""
    where = f"cuda:{rank.index}" if device.type == "cuda" else "cpu"
    return replace(
        options, model=model, revision=None, device=where, tokenizer=None, skip_tokenizer_init=True,
        generation_config="none",
    )  # fmt: skip


def _end_with(parent: int) -> None:
    """End this process when the driver does, even while it waits for another rank."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="paceline-parent").start()
