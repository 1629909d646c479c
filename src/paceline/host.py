"""Facts of this machine, read without torch: the CPU, its memory, NVIDIA's driver. What it does not tell is None."""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
# Instruction sets that decide which matrix products oneDNN and torch can use; x86's names, then Arm's.
ISA = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "fphp", "bf16", "i8mm", "sve", "sve2"),
)


@dataclass(frozen=True)
class Cpu:
    """`threads`: logical processors of the machine; `usable`: those that this process may run on; `quota`: the control
    group's limit in processors; `isa`: what it has of ISA."""

    model: str | None
    cores: int | None
    threads: int | None
    usable: int | None
    quota: float | None
    isa: tuple[str, ...]


def read_cpu() -> Cpu:
    text = _read(Path("/proc/cpuinfo")) or ""
    model, cores, isa = parse_cpuinfo(text)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return Cpu(model or platform.processor() or None, cores, os.cpu_count(), usable, parse_quota(_cpu_max()), isa)


def parse_cpuinfo(text: str) -> tuple[str | None, int | None, tuple[str, ...]]:
    """Model, physical cores and instruction sets from Linux's /proc/cpuinfo; Arm's has neither a model nor cores."""
    cores, socket = set(), ""
    for line in text.splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name == "physical id":
            socket = value
        elif name == "core id":
            cores.add((socket, value))
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    return model[1].strip() if model else None, len(cores) or None, tuple(name for name in ISA if name in has)


def parse_quota(text: str | None) -> float | None:
    """Processors that cgroup v2's cpu.max ("200000 100000", "max 100000") allows; None for no limit."""
    parts = (text or "").split()
    return int(parts[0]) / int(parts[1]) if len(parts) == 2 and parts[0].isdigit() else None


def total_memory() -> int:
    """Bytes that the machine has, whatever the control group allows."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int:
    """Bytes that can still be had: what the kernel calls available, or what the control group leaves where that is
    less; all of it on a system that tells neither."""
    free = _meminfo_available() or total_memory()
    limit, used = cgroup_bytes("memory.max"), cgroup_bytes("memory.current")
    return free if limit is None or used is None else min(free, max(0, limit - used))


def _meminfo_available() -> int | None:
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", _read(Path("/proc/meminfo")) or "", re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def cgroup_bytes(name: str) -> int | None:
    """A number of this control group (v2): memory.max, memory.current. None without one, and for "max"."""
    text = (_read(CGROUP / name) or "").strip()
    return int(text) if text.isdigit() else None


def _cpu_max() -> str | None:
    return _read(CGROUP / "cpu.max")


def process_age() -> float | None:
    """Seconds since this process was started, to 10 ms (Linux)."""
    fields = (_read(Path("/proc/self/stat")) or "").rpartition(")")[2].split()  # the name before it may hold anything
    if len(fields) < 20 or not hasattr(time, "CLOCK_BOOTTIME"):
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def nvidia_driver() -> str | None:
    """The version of NVIDIA's kernel module (Linux)."""
    match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", _read(Path("/proc/driver/nvidia/version")) or "")
    return match[1] if match else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
