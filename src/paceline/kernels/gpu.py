"""What a launch of a Triton kernel depends on, besides its shapes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch


@dataclass(frozen=True)
class GPU:
    name: str
    processors: int  # multiprocessors
    dependent: bool  # has programmatic dependent launch: compute capability 9.0 and up
    ptx: bool  # takes PTX between Triton's operations


@cache
def gpu(device: torch.device) -> GPU:
    """Of the interpreter, for a device that is none: 8 processors, so that small tests split their work too."""
    if device.type != "cuda":
        return GPU("interpreter", 8, dependent=False, ptx=False)
    found, nvidia = torch.cuda.get_device_properties(device), torch.version.hip is None
    return GPU(found.name, found.multi_processor_count, nvidia and found.major >= 9, nvidia)


def triton_refusal(device: torch.device) -> str | None:
    """Why no Triton kernel runs there; None when one can."""
    if device.type != "cuda":
        return f"device is {device.type}"
    if find_spec("triton") is None:
        return "triton is not installed"
    return None
