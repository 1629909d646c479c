"""The process that measures one engine: `python -m paceline.benchmark.worker RESULT`, a Job as JSON on stdin.

RESULT is written: {"result": ...}, or {"error": ..., "exit_code": ...}. A process of its own for each, so that its
start is timed as a user sees it, and no engine finds the memory, the kernels or the threads of another.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from paceline.benchmark.cuda_memory import CudaMemory
from paceline.benchmark.job import Context, Job, Memory, Result, Subject, read_job
from paceline.benchmark.process import answer_in_file
from paceline.benchmark.protocol import DECODED, FIRST, measure, random_prompt
from paceline.errors import EngineError
from paceline.phases import Phases

if TYPE_CHECKING:
    import torch

Build = Callable[[Job, "torch.device", Phases], Subject]


# Imports inside these functions: they are one of the phases that are timed.
def _paceline() -> Build:
    from paceline.benchmark.engines import paceline_llm

    return paceline_llm.build


def _transformers() -> Build:
    from paceline.benchmark.engines import transformers_generate

    return transformers_generate.build


def _transformers_static() -> Build:
    from paceline.benchmark.engines import transformers_generate

    return transformers_generate.build_static


def _gpt_fast() -> Build:
    from paceline.benchmark.engines import gpt_fast

    return gpt_fast.build


ENGINES: Mapping[str, Callable[[], Build]] = MappingProxyType(
    {
        "paceline": _paceline,
        "transformers": _transformers,
        "transformers static": _transformers_static,
        "gpt-fast": _gpt_fast,
    }
)


def main() -> int:
    return answer_in_file(lambda data: run(read_job(data)))


def run(job: Job) -> Result:
    """Build the engine, time its start, then measure it. Raises PacelineError's children."""
    phases = Phases()
    if job.started:
        phases.seconds["process"] = max(0.0, time.time() - job.started)
    with phases.time("import"):
        import torch

        from paceline.engine.device import pick_device

        build = ENGINES[job.engine]()
    device = pick_device(job.device)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    with phases.time("device"):
        torch.zeros(1, device=device)
    split = job.tensor_parallel_size > 1  # over processes of their own, whose memory is not counted here
    memory = None if device.type == "cpu" or split else CudaMemory(device)
    subject = build(job, device, phases)
    if memory is not None:
        memory.loaded()
    vocab_size = int(job.config["vocab_size"])
    prompts = [random_prompt(length, vocab_size) for length in job.contexts]
    with phases.time("first token"):
        subject.generate(prompts[0], 1)
    contexts = tuple(_measure(job, subject, prompt) for prompt in prompts)
    if memory is None:
        counted = Memory(subject.planned, None, None if split else peak_of_process())
    else:
        counted = memory.counted(subject)
    from paceline.benchmark.bandwidth import read_bandwidth

    return Result(
        engine=job.engine,
        version=subject.version,
        weight_format=subject.weight_format,
        dtype=subject.dtype,
        device=str(device),
        machine=read_machine(device),
        contexts=contexts,
        step_weight_bytes=subject.step_weight_bytes,
        head_bits=subject.head_bits,
        phases=phases.seconds,
        memory=counted,
        bandwidth=read_bandwidth(device),
    )


def _measure(job: Job, subject: Subject, prompt: list[int]) -> Context:
    import torch

    from paceline.benchmark.mbu import mean_context_bytes
    from paceline.config import ParallelConfig
    from paceline.models.registry import read_decoder_config
    from paceline.parallel.split import Rank, local_groups

    timing = measure(subject.generate, prompt, job.rounds)
    # The step that makes token n attends to the prompt and the n - 1 tokens before it.
    rank = Rank(0, ParallelConfig(job.tensor_parallel_size))  # a step reads as much of each device
    kv_bytes = mean_context_bytes(
        local_groups(read_decoder_config(job.config), rank),
        len(prompt) + FIRST,
        DECODED,
        getattr(torch, subject.dtype).itemsize,
    )
    return Context(timing, subject.step_weight_bytes + kv_bytes)


def peak_of_process() -> int:
    """Bytes resident, at most. Raises EngineError where the system does not tell."""
    if sys.platform == "win32":
        raise EngineError("the peak memory of a process is not read on Windows: measure on Linux or macOS")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux says KiB


def read_machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on: the device and the versions."""
    import platform

    import torch

    from paceline import host

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else host.read_cpu().model,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    sys.exit(main())
