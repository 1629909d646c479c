"""What a worker process is asked and what it answers, as plain data that travels as JSON. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paceline.benchmark.protocol import Generate, Timing


@dataclass(frozen=True)
class Job:
    """One engine at one precision. `engine`: a key of worker.ENGINES; `weight_format`: "dense" or a format's name;
    `gpt_fast`: the directory of its checkout; `mode`, `tensor_parallel_size`: paceline's, as LLM takes them; `started`:
    time.time() when its process was started."""

    engine: str
    shape: str
    config: Mapping[str, Any]
    contexts: tuple[int, ...]
    rounds: int
    dtype: str = "auto"
    weight_format: str = "dense"
    device: str = "auto"
    threads: int | None = None
    gpt_fast: str | None = None
    mode: str = "auto"
    tensor_parallel_size: int = 1
    started: float = 0.0


@dataclass(frozen=True)
class Memory:
    """Bytes of each part, as planned and as counted on the device. None: not counted there (the CPU's allocator keeps
    no count), or not planned (another engine). The part "loading" lies beside the weights before the others come.
    `peak`: the most at once, of the device, or on the CPU of the process, its code included; None for a model that is
    split, whose processes are not this one."""

    planned: Mapping[str, int] | None
    measured: Mapping[str, int] | None
    peak: int | None


def at_once(parts: Mapping[str, int]) -> int:
    """Bytes of parts as in Memory where the most are held: while loading or after."""
    weights, loading = parts.get("weights", 0), parts.get("loading", 0)
    return max(weights + loading, sum(parts.values()) - loading)


@dataclass(frozen=True)
class Context:
    """`timing`, and the bytes that each of its decode steps reads: weights, and the keys and values so far."""

    timing: Timing
    bytes_per_token: int


@dataclass(frozen=True)
class Result:
    """`version`: of another engine; None is this paceline's. `phases`: seconds of each part from the start of the
    process to its first token. `bandwidth`: bytes a second that the device reads. `head_bits`: stored for a value of
    the output head."""

    engine: str
    version: str | None
    weight_format: str
    dtype: str
    device: str
    machine: Mapping[str, Any]
    contexts: tuple[Context, ...]
    step_weight_bytes: int
    head_bits: float
    phases: Mapping[str, float]
    memory: Memory
    bandwidth: float


@dataclass(frozen=True)
class Subject:
    """A loaded engine, ready to be measured. `version` as in Result, `planned` as in Memory; `held`: bytes on the
    device that are no weights, by their part of Memory; `load_peak`: the most that torch had allocated there until the
    weights were loaded."""

    generate: Generate
    version: str | None
    dtype: str
    weight_format: str
    step_weight_bytes: int
    head_bits: float
    planned: Mapping[str, int] | None = None
    held: Mapping[str, int] = field(default_factory=dict)
    load_peak: int = 0


def read_job(data: Mapping[str, Any]) -> Job:
    return Job(**{**data, "contexts": tuple(data["contexts"])})


def read_result(data: Mapping[str, Any]) -> Result:
    contexts = tuple(
        Context(
            Timing(one["timing"]["context"], tuple(one["timing"]["first_token"]), tuple(one["timing"]["decode"])),
            one["bytes_per_token"],
        )
        for one in data["contexts"]
    )
    return Result(**{**data, "contexts": contexts, "memory": Memory(**data["memory"])})
