"""Which device and dtype a model runs on, and how much memory is free there."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from paceline.errors import UsageError
from paceline.host import available_memory
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
    """'auto' keeps what the checkpoint stores, so that nothing is lost, with two exceptions told in the log:
    float16 runs as float32 on CPU, which has no fast float16, and float32 as bfloat16 on CUDA, at half the bytes."""
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name != "auto":
        return lookup(DTYPES, "dtype", name)
    if device.type == "cpu" and stored == torch.float16:
        log.info("the checkpoint is float16; running in float32, which this CPU computes faster")
        return torch.float32
    if device.type == "cuda" and stored == torch.float32:
        chosen = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        log.info("the checkpoint is float32; running in %s (dtype='float32' keeps it)", str(chosen)[6:])
        return chosen
    return stored


def available_bytes(device: torch.device) -> int:
    """Memory that can still be had: what the driver calls free on CUDA; on CPU what the kernel calls available,
    or the control group's limit where that is lower."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()
