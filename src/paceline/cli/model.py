"""A model run by a command: loaded with a progress bar, asked with the command's defaults, and timed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from paceline.cli.exit_codes import EXIT_INTERRUPTED
from paceline.cli.report import Answer
from paceline.errors import EngineError
from paceline.host import process_age
from paceline.sampling.params import SamplingParams

if TYPE_CHECKING:
    from paceline.benchmark.mbu import DecodeFigures
    from paceline.llm import LLM

# What the commands ask where neither the user nor the model's generation_config.json says anything. At
# SamplingParams' temperature of 1 the default model answers "Why is the sky blue?" with "The art of the sky and the
# Red Serenade dances"; at its authors' 0.2 it explains Rayleigh scattering.
DEFAULT_TEMPERATURE = 0.2
_ENGINE = (
    "model",
    "revision",
    "dtype",
    "device",
    "threads",
    "max_model_len",
    "memory_gib",
    "offload_dir",
    "chat_template",
    "model_impl",
    "mode",
    "deterministic",
    "tensor_parallel_size",
    "pipeline_parallel_size",
)


def load_model(options: Mapping[str, Any]) -> LLM:
    """The model that the engine options name, for one request at a time; a bar shows progress on a terminal."""
    with interrupt_ends_at_once():
        from paceline.cli.progress import terminal_progress
        from paceline.llm import LLM

    return LLM(
        **{name: options[name] for name in _ENGINE},
        quantization=options["quantize"],
        offload=options["offload_to"] or ("auto" if options["offload"] else None),
        speculative_config={"method": options["speculative"]} if options["speculative"] else None,
        max_num_seqs=1,
        progress=terminal_progress(options["quiet"]),
    )


@contextmanager
def interrupt_ends_at_once() -> Iterator[None]:
    """Ctrl-C while torch is imported: a KeyboardInterrupt raised there is swallowed (one sent 0.6 s after the start was
    lost, and the answer came anyway). Nothing is there to clean up yet, so the process ends."""
    if threading.current_thread() is not threading.main_thread():  # only the main one may set handlers
        yield
        return
    previous = signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def interrupt_stops() -> Iterator[Callable[[], bool]]:
    """Ctrl-C ends the answer after the step under way, where the engine's books are right: gives what stream_answer
    asks after each step. A second Ctrl-C is an interrupt as usual."""
    pressed, asked = threading.Event(), threading.Event()

    def press(*_: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()
        if not asked.is_set():  # a long prompt is being read: seconds may pass
            os.write(2, b"stopping once the prompt is read; Ctrl-C again leaves\n")

    def stopped() -> bool:
        asked.set()
        return pressed.is_set()

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    previous = signal.signal(signal.SIGINT, press)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, previous)


def effective_sampling(llm: LLM, given: Mapping[str, Any], command: str) -> tuple[SamplingParams, dict[str, str]]:
    """The parameters to run with, and where each came from that is not SamplingParams' own default: `command`,
    generation_config or request."""
    ours: dict[str, Any] = {"max_tokens": None}  # to the model's own end
    _, from_model = llm.effective_sampling_params({**ours, **given})
    if not from_model:
        ours["temperature"] = DEFAULT_TEMPERATURE
    params, _ = llm.effective_sampling_params({**ours, **given})
    return params, {
        **dict.fromkeys(ours, command),
        **dict.fromkeys(from_model, "generation_config"),
        **dict.fromkeys(given, "request"),
    }


def write_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def stream_answer(
    llm: LLM,
    request: Any,
    params: SamplingParams,
    write: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
) -> Answer:
    """Generate, writing each new piece of text as it comes, and a line end after the last.

    Ends early once `stopped()`, asked after each step, says so; `last` then has no finish reason.
    Raises EngineError where the request failed.
    """
    pieces: list[str] = []
    token_ids: list[int] = []
    num_steps = 0
    for output in llm.stream(request, params):
        new = output.outputs[0]
        num_steps += bool(new.token_ids)
        token_ids.extend(new.token_ids)
        pieces.append(new.text)
        if new.text:
            write(new.text)
        if stopped():
            break
    if new.error is not None:
        raise EngineError(new.error)
    text = "".join(pieces)
    if not text.endswith("\n"):
        write("\n")
    return Answer(text, tuple(token_ids), num_steps, output)


def start_phases(llm: LLM, answer: Answer, loaded: float) -> dict[str, float]:
    """Seconds of each part of the time from this process's start to its first token: "import" (Python and torch; where
    the system tells when the process began), what LLM.stats names, "first token". `loaded`: when the model was, on
    time.perf_counter's clock."""
    age, first = process_age(), answer.last.metrics.first_token_time
    loading = dict(llm.stats().phases)
    phases = loading
    if age is not None:
        began = time.perf_counter() - age
        phases = {"import": loaded - began - sum(loading.values()), **loading}
    return phases if first is None else {**phases, "first token": first - loaded}


def decode_figures(llm: LLM, answer: Answer, bandwidth: float | None = None) -> DecodeFigures | None:
    """The decode's speed beside the device's; None where there was no decode step after the first token's.
    `bandwidth`: what the device reads a second where that is known, else it is measured now (0.15 s)."""
    metrics = answer.last.metrics
    if answer.num_steps < 2 or metrics.first_token_time is None or metrics.last_token_time is None:
        return None
    from paceline.benchmark.bandwidth import read_bandwidth
    from paceline.benchmark.mbu import DecodeFigures, decode_bytes

    stats = llm.stats()
    num_tokens = len(answer.token_ids) - 1  # the first token is the prefill's
    return DecodeFigures(
        num_tokens=num_tokens,
        seconds=metrics.last_token_time - metrics.first_token_time,
        bytes_moved=decode_bytes(
            weight_bytes=stats.step_weight_bytes,
            kv_bytes_per_token=stats.kv_bytes_per_token,
            num_steps=answer.num_steps - 1,
            first_context=len(answer.last.prompt_token_ids) + 1,
            num_tokens=num_tokens,
        ),
        bandwidth=bandwidth or read_bandwidth(llm.model.device),
    )
