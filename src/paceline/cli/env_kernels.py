"""What `paceline env` tells of the Triton kernels on a device: plain data in, lines out. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

NO_GPU = "none here: torch's operators run instead, each model's own in paceline explain"


class Device(Protocol):
    """kernels.gpu.GPU, without torch."""

    @property
    def name(self) -> str: ...
    @property
    def processors(self) -> int: ...
    @property
    def capability(self) -> tuple[int, int] | None: ...
    @property
    def triton(self) -> str | None: ...
    @property
    def dependent(self) -> bool: ...
    @property
    def bf16(self) -> bool: ...
    @property
    def fp8(self) -> bool: ...


def kernel_lines(device: Device, tables: Sequence[tuple[str, int]]) -> list[str]:
    """`tables`: the files of tuned launches that are read for this device, and how many each has; ours first."""
    kind = "AMD" if device.capability is None else "compute capability {}.{}".format(*device.capability)
    about = f"{device.name}, {kind}, {device.processors} multiprocessors"
    if device.triton is not None:
        return [about, f"do not run: {device.triton}", "torch's operators run instead; decodes have no CUDA graph"]
    return [
        about,
        "run in float32, float16 and bfloat16" if device.bf16 else "run in float32 and float16",
        *([] if device.bf16 else ["no bfloat16 before compute capability 8.0: such checkpoints run in float16"]),
        *([] if device.fp8 else ["no loads of fp8 before compute capability 8.9: its bytes are taken apart"]),
        _dependent(device),
        *_tuned(tables),
    ]


def _dependent(device: Device) -> str:
    if device.dependent:
        return "each starts while its predecessor runs (programmatic dependent launch)"
    why = "NVIDIA's alone" if device.capability is None else "from compute capability 9.0 on"
    return f"each starts after its predecessor: programmatic dependent launch is {why}"


def _tuned(tables: Sequence[tuple[str, int]]) -> list[str]:
    if not tables:
        return ["launches by rule: no table was tuned for this device (paceline tune writes one)"]
    return [f"{count} launches tuned in {path}" for path, count in tables] + ["other launches by rule"]
