"""Which device and dtype a model runs on, and how much memory is free there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from paceline.errors import UsageError
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
    free = _meminfo_available()
    limit, used = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return free


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_bytes(name: str) -> int | None:
    try:
        return int(Path("/sys/fs/cgroup", name).read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return None
