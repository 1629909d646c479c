"""The engine's life where it runs, be it a thread or a process: load, serve, and show how it is."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace

import torch

from paceline.encoders.encoder import Encoder
from paceline.encoders.load import find_encoder, load_encoder
from paceline.engine.build import LoadedModel, load_model
from paceline.engine.load_options import LoadOptions
from paceline.engine.model_runner import ModelRunner
from paceline.engine.ranks import load_ranks
from paceline.engine.warm_up import WarmUp
from paceline.errors import PacelineError
from paceline.phases import Phases
from paceline.serve.admission import QueueLimits
from paceline.serve.client import ModelInfo, Startup, Transfer
from paceline.serve.encoder_loop import EncoderLoop
from paceline.serve.engine_loop import EngineLoop
from paceline.serve.failures import failure_of
from paceline.serve.loop import Loop, Port
from paceline.serve.messages import Beat, Load, LoadFailed


class EngineHost:
    """`run` belongs to one thread; `beat` may be asked by any. Also a loading.Progress: the bytes of what is read."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._loop: Loop | None = None
        self._label = ""
        self._total = self._done = 0

    def run(self, options: LoadOptions, threads: int | None, limits: QueueLimits, port: Port) -> None:
        """Until a client says Shutdown. A model that cannot be loaded is told to each client that says Hello. Raises
        whatever the engine raises while it serves."""
        if threads is not None:
            torch.set_num_threads(threads)
        with ExitStack() as held:
            try:
                self._loop = self._load(options, limits, port, held)
            except PacelineError as error:
                for client, _ in port.receive(wait=True):
                    port.send(client, LoadFailed(failure_of(error)))
                return
            self._loop.run()

    def _load(self, options: LoadOptions, limits: QueueLimits, port: Port, held: ExitStack) -> Loop:
        """`held`: gets what has to end with the loop."""
        # Text is the API's: here is no tokenizer.
        options = replace(options, skip_tokenizer_init=True)
        with self._phases.time("resolve"):
            source, task = find_encoder(options, self)
        if source is not None and task is not None:
            encoder = load_encoder(options, source, task, self, self._phases).encoder
            return EncoderLoop(encoder, options.scheduler, encoder_info(options, encoder, self._phases), limits, port)
        if options.parallel.world_size > 1:
            model = load_ranks(options, self, self._phases)
        else:
            model = load_model(options, self, self._phases, warm=False, source=source)
        if model.ranks is not None:
            held.callback(model.ranks.close)
        runner, warm_up = model.engine.runner, WarmUp(self._phases)
        if isinstance(runner, ModelRunner):  # the ranks of a model that is split warm up as they load
            compiles = runner.model if options.mode == "compile" else None
            warm_up = WarmUp(self._phases, runner.decode, compiles)
        return EngineLoop(model.engine, model_info(options, model), limits, port, warm_up)

    def beat(self) -> Beat:
        return beat_of(self._phases, self._transfer, self._loop)

    @property
    def _transfer(self) -> Transfer | None:
        return Transfer(self._label, self._total, self._done) if self._label else None

    def start(self, label: str, total_bytes: int) -> None:
        self._label, self._total, self._done = label, total_bytes, 0

    def advance(self, n: int) -> None:
        self._done += n

    def done(self) -> None:
        self._label = ""


def beat_of(phases: Phases, transfer: Transfer | None, loop: Loop | None) -> Beat:
    """How an engine is. Read from another thread than the engine's: each value is read once, and may be a step old."""
    startup = Startup(dict(phases.seconds), phases.current, transfer)
    if loop is None:
        return Beat(startup, Load())
    now, last, busy = time.monotonic(), loop.last_step, loop.busy_since
    return Beat(
        startup,
        loop.load,
        stuck_seconds=None if busy is None else now - max(busy, last or 0.0),
        last_step_age=None if last is None else now - last,
    )


def model_info(options: LoadOptions, model: LoadedModel) -> ModelInfo:
    config = model.engine.config
    return ModelInfo(
        model=options.model,
        vocab_size=model.config.vocab_size,
        max_model_len=config.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        quantization=options.quantization,
        generation_config=model.generation_config,
        num_kv_tokens=model.engine.scheduler.stats.cache.total_blocks[0] * config.cache.block_size,
        phases=dict(model.phases),
    )


def encoder_info(options: LoadOptions, encoder: Encoder, phases: Phases) -> ModelInfo:
    return ModelInfo(
        model=options.model,
        vocab_size=encoder.info.vocab_size,
        max_model_len=encoder.info.max_length,
        max_num_seqs=options.scheduler.max_num_seqs,
        dtype=str(encoder.dtype).removeprefix("torch."),
        device=str(encoder.device),
        quantization=None,
        generation_config={},
        num_kv_tokens=0,
        phases=dict(phases.seconds),
        encoder=encoder.info,
    )
