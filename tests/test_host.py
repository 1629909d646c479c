"""The machine's facts, from what Linux writes about x86 and Arm, and on this machine."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from paceline import host

X86 = """processor\t: 0
model name\t: AMD EPYC 9654 96-Core Processor
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu avx2 fma avx512f avx512_bf16 nope
processor\t: 1
physical id\t: 0
core id\t\t: 0
processor\t: 2
physical id\t: 1
core id\t\t: 0
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd fphp asimddp sve i8mm bf16\nCPU part\t: 0xd40\n"


def test_cpuinfo():
    assert host.parse_cpuinfo(X86) == (
        "AMD EPYC 9654 96-Core Processor",
        2,  # three threads on two cores of two sockets
        ("avx2", "fma", "avx512f", "avx512_bf16"),
    )
    assert host.parse_cpuinfo(ARM) == (None, None, ("asimd", "asimddp", "fphp", "bf16", "i8mm", "sve"))
    assert host.parse_cpuinfo("") == (None, None, ())


@pytest.mark.parametrize(
    ("text", "quota"), [("150000 100000\n", 1.5), ("max 100000\n", None), (None, None), ("", None)]
)
def test_the_quota_of_a_control_group(text, quota):
    assert host.parse_quota(text) == quota


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    monkeypatch.setattr(host, "_meminfo_available", lambda: 1000)
    return tmp_path


def test_a_control_groups_limit_counts(cgroup):
    assert host.available_memory() == 1000  # no files: no control group
    (cgroup / "memory.max").write_text("700\n")
    (cgroup / "memory.current").write_text("300\n")
    assert host.available_memory() == 400
    (cgroup / "memory.current").write_text("900\n")
    assert host.available_memory() == 0
    (cgroup / "memory.max").write_text("max\n")
    assert host.available_memory() == 1000


def test_a_limit_above_what_is_free_changes_nothing(cgroup):
    (cgroup / "memory.max").write_text("5000\n")
    (cgroup / "memory.current").write_text("300\n")
    assert host.available_memory() == 1000


def test_this_machine():
    cpu = host.read_cpu()
    assert cpu.threads >= (cpu.usable or 1) >= 1
    assert host.total_memory() > 2**28
    assert host.available_memory() <= host.total_memory()


def test_the_driver_is_read_from_the_kernel_module(monkeypatch):
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build\nGCC version: 12\n"
    monkeypatch.setattr(host, "_read", lambda path: line)
    assert host.nvidia_driver() == "570.133.20"
    monkeypatch.setattr(host, "_read", lambda path: None)
    assert host.nvidia_driver() is None


def test_the_age_of_this_process(monkeypatch):
    if not host.Path("/proc/self/stat").exists():
        assert host.process_age() is None
        return
    code = "import time; time.sleep(0.2); from paceline.host import process_age; print(process_age())"
    start = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.19 < age < time.monotonic() - start + 0.02
    monkeypatch.setattr(host, "_read", lambda path: None)
    assert host.process_age() is None
