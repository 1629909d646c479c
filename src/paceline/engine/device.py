"""Which device and dtype a model runs on, and how much memory is free there."""

from __future__ import annotations

from collections.abc import Mapping
from logging import INFO, WARNING
from types import MappingProxyType

import torch

from paceline.errors import UsageError
from paceline.host import available_memory
from paceline.kernels.gpu import untried_gpu
from paceline.log import get_logger
from paceline.registry import lookup

log = get_logger(__name__)

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "float32": torch.float32,
        "float": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "half": torch.float16,
        "fp16": torch.float16,
    }
)


def pick_device(name: str) -> torch.device:
    """'auto' is the first CUDA device where there is one. Raises UsageError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device '{name}': use 'auto', 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device '{name}' is not supported: use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise UsageError(f"device '{name}' is not there: this torch sees {count} CUDA devices; use 'cpu'")
    return device


def pick_dtype(name: str | torch.dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """A dtype by its name; 'auto' is `auto_dtype`, told in the log where it is not what the checkpoint stores."""
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name != "auto":
        return lookup(DTYPES, "dtype", name)
    chosen = auto_dtype(stored, device.type, bf16=device.type != "cuda" or untried_gpu(device).bf16)
    if chosen == stored:
        return stored
    names, why = tuple(str(dtype).removeprefix("torch.") for dtype in (stored, chosen)), "at half the bytes"
    if device.type == "cpu":
        why = "which this CPU computes faster"
    elif stored == torch.bfloat16:
        why = f"since {untried_gpu(device).name} has no bfloat16; values above 65,504 overflow"
    log.log(WARNING if stored == torch.bfloat16 else INFO, "the checkpoint is %s; running in %s, %s", *names, why)
    return chosen


def auto_dtype(stored: torch.dtype, device_type: str, *, bf16: bool) -> torch.dtype:
    """What the checkpoint stores, so that nothing is lost, with exceptions: float16 runs as float32 on a CPU, which has
    no fast float16; on CUDA float32 runs as bfloat16, and both as float16 on a GPU without bfloat16 (`bf16`)."""
    if device_type == "cpu":
        return torch.float32 if stored == torch.float16 else stored
    if stored in (torch.float32, torch.bfloat16):
        return torch.bfloat16 if bf16 else torch.float16
    return stored


def available_bytes(device: torch.device) -> int:
    """Memory that can still be had: what the driver calls free on CUDA; on CPU what the kernel calls available,
    or the control group's limit where that is lower."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()
