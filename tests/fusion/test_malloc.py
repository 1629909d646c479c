"""Page faults of a process that allocates and frees as a model's layers do, counted by the kernel."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

import paceline
from paceline.fusion import capture

LAYERS = """
import resource, torch
from paceline.fusion.malloc import keep_freed_memory
if {keep}:
    keep_freed_memory()
def layer():
    kept = torch.zeros(1 << 20)
    return kept, torch.zeros(1 << 20) + kept
for count in (3, 10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        layer()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_kept() -> None:
    faults = [
        int(subprocess.run([sys.executable, "-c", LAYERS.format(keep=keep)], capture_output=True, check=True).stdout)
        for keep in (False, True)
    ]
    assert faults[1] < 200
    if faults[0] < 200:
        pytest.skip("this process keeps it without being asked")


def test_a_graph_on_a_cpu_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(capture, "keep_freed_memory", lambda: asked.append(True))
    paceline.optimize(torch.nn.Linear(4, 4).eval())(torch.zeros(2, 4))
    assert asked == [True]
