"""What a CUDA device holds for an engine, part by part, by the counts of torch's allocator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.benchmark.job import Memory, Subject

if TYPE_CHECKING:
    import torch


class CudaMemory:
    """Counts from when it is made: make it before the engine is built, tell it when that is `loaded`, and ask it after
    the last step."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._cuda, self._device = torch.cuda, device
        self._before = torch.cuda.memory_allocated(device)
        self._pools_before = self._graph_pools()
        self._loaded = self._peak = 0
        torch.cuda.reset_peak_memory_stats(device)

    def loaded(self) -> None:
        """From here on the peak is that of steps."""
        self._loaded = self._cuda.memory_allocated(self._device) - self._before
        self._peak = self._cuda.max_memory_allocated(self._device) - self._before
        self._cuda.reset_peak_memory_stats(self._device)

    def counted(self, subject: Subject) -> Memory:
        """Every allocated byte since the start is in one part. Graphs keep their pool's segments whole, of which the
        allocator counts as allocated only what they still use: nothing, or cuBLAS's workspace. What else stays after a
        step is cuBLAS's workspace too."""
        used, pools = (now - before for now, before in zip(self._graph_pools(), self._pools_before, strict=True))
        now = self._cuda.memory_allocated(self._device) - self._before - used
        peak = self._cuda.max_memory_allocated(self._device) - self._before - used
        weights = self._loaded - sum(subject.held.values())
        measured = {
            "loading": max(0, subject.load_peak - self._before - weights),
            "weights": weights,
            **subject.held,
            "graphs": pools,
            "cuBLAS": now - self._loaded,
            "step": peak - now,
        }
        return Memory(subject.planned, measured, max(self._peak, peak + pools))

    def _graph_pools(self) -> tuple[int, int]:
        """Bytes in use, and bytes, of the segments that are graphs' own."""
        segments = [
            segment
            for segment in self._cuda.memory_snapshot()  # type: ignore[no-untyped-call]
            if segment["device"] == (self._device.index or 0) and tuple(segment["segment_pool_id"]) != (0, 0)
        ]
        return (sum(s["allocated_size"] for s in segments), sum(s["total_size"] for s in segments))
