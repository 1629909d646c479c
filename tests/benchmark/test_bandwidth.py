"""The read-only probe, against a count of its own bytes and time."""

from __future__ import annotations

import time

import pytest
import torch

from paceline.benchmark import bandwidth


def test_a_cpu_reads_between_one_and_a_thousand_gigabytes_a_second():
    start = time.perf_counter()
    rate = bandwidth.read_bandwidth("cpu")
    seconds = time.perf_counter() - start
    assert 1e9 < rate < 1e12
    # It read the buffer at least once within the time that the whole call took.
    assert rate > bandwidth.CPU_PROBE_BYTES / seconds


def test_the_figure_is_the_best_pass(monkeypatch):
    """With a clock of our own: passes of 8, 2 and 4 ms read 128 MiB; the roof is the 2 ms one."""
    ticks = iter([0.0, 0.0, 0.008, 0.010, 0.012, 0.020, 0.024, 0.030, 0.990])
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: next(ticks))
    assert bandwidth.read_bandwidth("cpu") == pytest.approx(bandwidth.CPU_PROBE_BYTES / 0.002)


@pytest.mark.gpu
def test_a_gpu_reads_faster_than_a_cpu_and_gives_its_memory_back():
    before = torch.cuda.memory_reserved()
    assert 100e9 < bandwidth.read_bandwidth("cuda") < 20e12
    assert torch.cuda.memory_reserved() == before
