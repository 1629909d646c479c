"""The process that measures one engine's many streams: `python -m paceline.benchmark.throughput_worker RESULT`.

A BatchJob as JSON on stdin; RESULT is written as benchmark/process.py says.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from paceline.benchmark.bandwidth import read_bandwidth
from paceline.benchmark.process import answer_in_file
from paceline.benchmark.protocol import DECODED, FIRST, PROMPT, measure, random_prompt
from paceline.benchmark.roof import Costs, read_operations, work_of
from paceline.benchmark.throughput import BatchJob, BatchResult, Run, Work, decoded_tokens, read_job
from paceline.benchmark.worker import peak_of_process, read_machine
from paceline.benchmark.workload import Ask, draw_asks
from paceline.engine.device import pick_device
from paceline.errors import EngineError

# The requests of a batch in, their tokens out, in order.
Generate = Callable[[Sequence[Ask]], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class BatchSubject:
    """A loaded engine. `version`: another engine's."""

    generate: Generate
    version: str | None
    dtype: str
    step_weight_bytes: int


def main() -> int:
    return answer_in_file(lambda data: run(read_job(data)))


def run(job: BatchJob) -> BatchResult:
    """Build the engine and measure it. Raises PacelineError's children."""
    device = pick_device(job.device)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    subject = _build(job, device)
    start = time.time() - job.started if job.started else 0.0
    timed = [(batch, _decodes(job, subject, batch)) for batch in job.batches]
    offline = None if job.workload is None else _offline(job, subject)
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_of_process()
    costs = Costs(job.config, getattr(torch, subject.dtype), subject.step_weight_bytes)
    runs = [Run(batch, seconds, 0, decoded_tokens(batch), _decode_work(costs, batch)) for batch, seconds in timed]
    if offline is not None:
        runs.append(_offline_run(job, costs, offline))
    return BatchResult(
        job.engine,
        subject.version,
        job.weight_format,
        subject.dtype,
        str(device),
        read_machine(device),
        tuple(runs),
        subject.step_weight_bytes,
        read_bandwidth(device),
        read_operations(device, getattr(torch, subject.dtype)),
        peak,
        start,
    )


def _build(job: BatchJob, device: torch.device) -> BatchSubject:
    # Each in its own process: another engine's packages may not be here.
    if job.engine == "transformers":
        from paceline.benchmark.engines import transformers_batch

        return transformers_batch.build(job, device)
    from paceline.benchmark.engines import paceline_batch

    return paceline_batch.build(job, device)


# ---------------------------------------------------------------------------------------- decodes of equal streams


def _decodes(job: BatchJob, subject: BatchSubject, batch: int) -> tuple[float, ...]:
    """Seconds of a batch's tokens FIRST to LAST, by protocol.py: as of one stream."""
    vocab_size = int(job.config["vocab_size"])
    prompts = [random_prompt(PROMPT, vocab_size, seed) for seed in range(batch)]

    def generate(_: Sequence[int], num_tokens: int) -> Sequence[int]:
        answers = _checked(subject, [Ask(prompt, num_tokens) for prompt in prompts])
        return answers[0]

    return measure(generate, prompts[0], job.rounds).decode


def _decode_work(costs: Costs, batch: int) -> Work:
    # The step that makes token n attends to the prompt and the n - 1 tokens before it.
    read = DECODED * costs.step_weight_bytes + batch * costs.context_bytes(PROMPT + FIRST, DECODED)
    return Work(0, 0, read, 2 * costs.values * decoded_tokens(batch))


# ------------------------------------------------------------------------------------------------- the workload


def _offline(job: BatchJob, subject: BatchSubject) -> tuple[float, ...]:
    """Seconds of each round, all requests given at once; a first round is thrown away."""
    assert job.workload is not None
    seconds = []
    for index in range(job.rounds + 1):
        asks = draw_asks(job.workload, int(job.config["vocab_size"]), index)
        start = time.perf_counter()
        _checked(subject, asks)
        seconds.append(time.perf_counter() - start)
    return tuple(seconds[1:])


def _offline_run(job: BatchJob, costs: Costs, seconds: tuple[float, ...]) -> Run:
    assert job.workload is not None
    asks = draw_asks(job.workload, int(job.config["vocab_size"]))
    lengths = [(len(ask.prompt), ask.num_tokens) for ask in asks]
    # The roof is what any engine could do: each group's prefix computed once, whether or not this engine does so.
    shared = max(0, len(asks) - job.workload.groups) * job.workload.prefix
    work = work_of(costs, lengths, shared=shared, streams=job.streams, step_tokens=job.step_tokens)
    return Run(None, seconds, sum(prompt for prompt, _ in lengths), sum(answer for _, answer in lengths), work)


def _checked(subject: BatchSubject, asks: Sequence[Ask]) -> Sequence[Sequence[int]]:
    answers = subject.generate(asks)
    for ask, answer in zip(asks, answers, strict=True):
        if len(answer) != ask.num_tokens:
            raise EngineError(f"asked for {ask.num_tokens} tokens and got {len(answer)}: nothing can be measured")
    return answers


if __name__ == "__main__":
    sys.exit(main())
