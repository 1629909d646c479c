"""Bytes of files into tensors on a CUDA device, at the speed of the link.

A copy from the mapped file goes through the driver's own small buffer, on one thread: 7 GB/s of Llama-3.1-8B's 16 GB in
the page cache. Here a few threads read into pinned buffers, two each, so that one is filled while the other is on its
way: 23 GB/s with 8 threads and 8 MiB, on 16 cores (4 threads and 16 MiB 17, 16 threads and 16 MiB 14; registering the
mapped file with CUDA, 4 threads, 19). Pinning the buffers takes 0.05 s.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from paceline.errors import CheckpointError, OutOfMemoryError
from paceline.loading.progress import Progress
from paceline.sizing import gib

THREADS = 8
CHUNK_BYTES = 8 << 20
# Below it a thread's start costs more than the plain copy.
FEWEST_BYTES = 1 << 20


@dataclass(frozen=True)
class FileSpan:
    """Where a tensor's values lie in a file, contiguous and in the byte order of memory."""

    path: Path
    offset: int
    nbytes: int


def upload_refusal(device: torch.device) -> str | None:
    """Why values must be copied plainly, one after the other; None where they need not be."""
    if device.type != "cuda":
        return f"device is {device.type}"
    return None if hasattr(os, "preadv") else "this system has no preadv"


class Upload:
    """Fills tensors from files in the background. Use it in a `with`, which waits for what is on its way.

    `progress` advances in `wait`, in the thread that calls it.
    """

    def __init__(self, device: torch.device, progress: Progress) -> None:
        # A thread's current device is the first one, whatever the caller's is.
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device(device.type, index)
        self._progress = progress
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="upload")
        self._worker = threading.local()
        self._workers: list[_Worker] = []
        self._files: dict[Path, int] = {}
        self._chunks: deque[tuple[Future[None], int]] = deque()

    def add(self, span: FileSpan, target: torch.Tensor) -> None:
        """Begin to fill `target`, contiguous and of as many bytes. Raises CheckpointError for a file that is gone."""
        if span.path not in self._files:
            try:
                self._files[span.path] = os.open(span.path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{span.path}: cannot be read ({error.strerror or error})") from error
        # Its memory may have been another tensor's, which the current stream still uses.
        free = torch.cuda.Event()  # type: ignore[no-untyped-call]
        free.record(torch.cuda.current_stream(self._device))
        flat = target.view(-1).view(torch.uint8)
        for start in range(0, span.nbytes, CHUNK_BYTES):
            chunk = flat[start : start + CHUNK_BYTES]
            future = self._executor.submit(self._fill, span.path, span.offset + start, chunk, free)
            self._chunks.append((future, chunk.numel()))

    def wait(self) -> None:
        """Until what was added is there for work queued on the current stream from now on.

        Raises CheckpointError where a file could not be read.
        """
        while self._chunks:
            future, nbytes = self._chunks.popleft()
            future.result()
            self._progress.advance(nbytes)
        for worker in self._workers:
            torch.cuda.current_stream(self._device).wait_stream(worker.stream)

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._executor.shutdown(cancel_futures=True)
            for worker in self._workers:
                worker.close()  # waits: the tensors may be freed once nothing writes to them
            for file in self._files.values():
                os.close(file)

    def _fill(self, path: Path, offset: int, target: torch.Tensor, free: torch.cuda.Event) -> None:
        if not hasattr(self._worker, "own"):
            self._worker.own = _Worker(self._device)
            self._workers.append(self._worker.own)
        worker: _Worker = self._worker.own
        buffer, copied = worker.next()
        values = buffer[: target.numel()]
        read_into(path, self._files[path], offset, values)
        worker.stream.wait_event(free)
        with torch.cuda.stream(worker.stream):
            target.copy_(values, non_blocking=True)
        copied.record(worker.stream)


class _Worker:
    """A thread's stream and its two pinned buffers, each with the event that says when it was copied."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._memory = torch.empty(2, CHUNK_BYTES, dtype=torch.uint8)
        # Not torch's pinned memory, whose allocator would keep it for the rest of the process.
        with torch.cuda.device(device):
            error = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), self._memory.nbytes, 0)  # type: ignore[no-untyped-call]
        if int(error) != 0:
            raise OutOfMemoryError(
                f"{gib(self._memory.nbytes)} of host memory cannot be pinned to load through (CUDA error {int(error)})"
            )
        self._events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def next(self) -> tuple[torch.Tensor, torch.cuda.Event]:
        """The buffer whose turn it is, free to be filled, and its event."""
        self._turn = 1 - self._turn
        event = self._events[self._turn]
        event.synchronize()
        return self._memory[self._turn], event

    def close(self) -> None:
        self.stream.synchronize()
        torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())  # type: ignore[no-untyped-call]


def read_into(path: Path, file: int, offset: int, values: torch.Tensor) -> None:
    """Fill `values`, uint8 on the CPU, from the open `file`. Raises CheckpointError where it ends early or fails."""
    rest = values.numpy().data
    while rest:
        try:
            count = os.preadv(file, [rest], offset)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
        if count == 0:
            raise CheckpointError(f"{path}: ended early at byte {offset}: something else has cut it; download it again")
        rest, offset = rest[count:], offset + count
