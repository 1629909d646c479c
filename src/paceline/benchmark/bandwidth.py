"""How fast the device reads memory: a read-only probe, the roof over every decode step.

Decoding one stream reads every weight once a token and does two operations a weight, so the memory's read
bandwidth bounds it. A copy or a triad (STREAM) also writes, and reports another number; this sums a buffer.
"""

from __future__ import annotations

import time

import torch

# 128 MiB: four times the 32 MiB last-level cache of the machine this was tuned on, where 64 MiB still read 1.2 to 1.6
# times too fast. Filling it costs 0.06 s there, a pass 3 ms.
CPU_PROBE_BYTES = 128 * 2**20
# An H100's L2 holds 50 MB; 1 GiB passes in 0.34 ms, well over a launch's few microseconds.
CUDA_PROBE_BYTES = 2**30
_PASSES = 12
_CPU_SECONDS = 0.08  # of reading; with the filling, the probe stays under 0.15 s


def read_bandwidth(device: str | torch.device = "cpu") -> float:
    """Bytes a second that `device` reads, the best of several passes over a buffer larger than its caches.

    On the CPU with torch's current number of threads. The buffer is freed before returning.
    """
    device = torch.device(device)
    return _probe_cuda(device) if device.type == "cuda" else _probe_cpu()


def _probe_cpu() -> float:
    # int64: the sum of float32 accumulates in cascades and was 5 % slower.
    buffer = torch.ones(CPU_PROBE_BYTES // 8, dtype=torch.int64)
    best = float("inf")
    stop = time.perf_counter() + _CPU_SECONDS
    for _ in range(_PASSES):
        start = time.perf_counter()
        buffer.sum()
        end = time.perf_counter()
        best = min(best, end - start)
        if end > stop:
            break
    return buffer.nbytes / best


def _probe_cuda(device: torch.device) -> float:
    free_bytes, _ = torch.cuda.mem_get_info(device)
    num_bytes = min(CUDA_PROBE_BYTES, free_bytes // 2)
    buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    buffer.sum()  # the first call loads the kernel
    best = float("inf")
    for _ in range(_PASSES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        buffer.sum()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    num_bytes = buffer.nbytes
    del buffer
    torch.cuda.empty_cache()  # the probe must not hold memory that the model's owner was promised
    return num_bytes / best
