"""Memory and bandwidth of well-known GPUs, as NVIDIA's data sheets print them, and sizes as people write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from paceline.errors import UsageError
from paceline.registry import lookup


@dataclass(frozen=True)
class Gpu:
    """`memory_gib`: what the data sheet calls GB; the driver shows 0 to 6 % less. `bandwidth`: bytes a second; reads
    reach 90 to 95 % of it. `capability`: NVIDIA's compute capability. `pattern` finds it in the device's own name."""

    memory_gib: int
    bandwidth: float
    capability: tuple[int, int]
    pattern: str
    source: str


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "h200": Gpu(141, 4.8e12, (9, 0), r"H200", "NVIDIA H200 data sheet"),
        "h100-nvl": Gpu(94, 3.9e12, (9, 0), r"H100 NVL", "NVIDIA H100 data sheet"),
        "h100-pcie": Gpu(80, 2.0e12, (9, 0), r"H100 PCIe", "NVIDIA H100 data sheet"),
        "h100": Gpu(80, 3.35e12, (9, 0), r"H100", "NVIDIA H100 data sheet, SXM"),
        "a100-40gb": Gpu(40, 1.555e12, (8, 0), r"A100.*40GB", "NVIDIA A100 data sheet"),
        "a100": Gpu(80, 2.039e12, (8, 0), r"A100.*80GB", "NVIDIA A100 data sheet, 80 GB SXM"),
        "l40s": Gpu(48, 864e9, (8, 9), r"L40S", "NVIDIA L40S data sheet"),
        "l4": Gpu(24, 300e9, (8, 9), r"L4\b", "NVIDIA L4 data sheet"),
        "a10": Gpu(24, 600e9, (8, 6), r"A10\b", "NVIDIA A10 data sheet"),
        "t4": Gpu(16, 320e9, (7, 5), r"T4\b", "NVIDIA T4 data sheet"),
        "rtx-5090": Gpu(32, 1792e9, (12, 0), r"RTX 5090", "NVIDIA RTX Blackwell white paper"),
        "rtx-4090": Gpu(24, 1008e9, (8, 9), r"RTX 4090", "NVIDIA Ada white paper"),
        "rtx-3090": Gpu(24, 936e9, (8, 6), r"RTX 3090\b(?! Ti)", "NVIDIA Ampere GA102 white paper"),
        "a6000": Gpu(48, 768e9, (8, 6), r"RTX A6000", "NVIDIA RTX A6000 data sheet"),
    }
)

UNITS = {"": None, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name in GPUS, capitals and spaces aside. Raises UsageError naming the nearest."""
    return lookup(GPUS, "GPU", name.lower().replace(" ", "-").replace("_", "-"))


def recognise_gpu(device_name: str) -> tuple[str, Gpu] | None:
    """The entry for a device's own name ("NVIDIA H100 80GB HBM3"), or None."""
    return next(((name, gpu) for name, gpu in GPUS.items() if re.search(gpu.pattern, device_name)), None)


def parse_bytes(text: str | int | float, what: str) -> int:
    """Bytes of '24GiB', '80 GB' or a number of bytes. Raises UsageError naming `what`."""
    if isinstance(text, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
        unit = UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise UsageError(f"{what} must be a size with its unit, such as 24GiB or 80GB, got {text!r}")
        text = float(match[1]) * unit
    if not text > 0:
        raise UsageError(f"{what} must be greater than 0, got {text}")
    return int(text)
