"""Weights that stay off the device, and cross over row slice by row slice while the step runs.

For models larger than the device: host memory, or a file, holds every matrix; a step reads all of them, in the order
in which it multiplies by them, and two slices are on their way while one is in use. A slice is a few rows of one
matrix, so no matrix, let alone a layer, has to fit. The price is the link: a step takes at least bytes / bandwidth.

Shapes: T tokens, N rows of a matrix, K columns.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import torch

from paceline.errors import OutOfMemoryError
from paceline.formats.dense import DenseWeight
from paceline.formats.fp8 import FP8Weight
from paceline.formats.fp8 import pack as pack_fp8
from paceline.formats.int8 import Int8Weight
from paceline.formats.int8 import pack as pack_int8
from paceline.formats.stores import Store

PIECE_ROWS = 1024  # of a matrix that are read, cast and packed at once while loading
AHEAD = 2  # slices on their way while one is in use
PROBE_BYTES = 256 << 20  # read once, after loading, to tell the user what a step will cost


@dataclass(frozen=True)
class _Slice:
    offset: int
    nbytes: int


class _Slot:
    """A buffer on the device, and on CUDA the pinned one that feeds it."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.staging = self.buffer
        self.copied: torch.cuda.Event | None = None
        self.used: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            self.copied, self.used = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]


class WeightStream:
    """Slices of a store, in the order of their use.

    `fetch` gives one and starts the next `AHEAD`; which those are is what followed it last time, or at first what was
    added after it. So a dense model never waits for a slice that was not asked for early, and a mixture of experts
    waits where the router turns elsewhere than it did one token before.
    """

    def __init__(self, store: Store, slice_bytes: int, device: torch.device) -> None:
        self.store = store
        self.slice_bytes = slice_bytes
        self.device = device
        self._slices: list[_Slice] = []
        self._next: list[int] = []
        self._slots = [_Slot(slice_bytes, device) for _ in range(1 + AHEAD)]
        self._free = deque(self._slots)
        self._coming: deque[tuple[int, _Slot, Future[None]]] = deque()
        self._held: tuple[int, _Slot] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="paceline-offload")
        self._link = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def buffer_bytes(self) -> int:
        """Device memory that the stream holds."""
        return len(self._slots) * self.slice_bytes

    def add(self, offset: int, nbytes: int) -> int:
        """Register a slice; its index."""
        self._slices.append(_Slice(offset, nbytes))
        self._next.append(0)
        index = len(self._slices) - 1
        if index:
            self._next[index - 1] = index
        return index

    def fetch(self, index: int) -> torch.Tensor:
        """The slice's bytes on the device, uint8; valid until the next fetch."""
        self._let_go(index)
        while self._coming and self._coming[0][0] != index:  # guessed wrong
            _, slot, future = self._coming.popleft()
            future.result()
            self._free.append(slot)
        if not self._coming:
            self._start(index)
        _, slot, future = self._coming.popleft()
        last = self._coming[-1][0] if self._coming else index
        while self._free and len(self._coming) < min(AHEAD, len(self._slices) - 1):
            last = self._next[last]
            self._start(last)
        future.result()  # raises what the reader met
        if slot.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.copied)
        self._held = (index, slot)
        return slot.buffer[: self._slices[index].nbytes]

    def _let_go(self, following: int) -> None:
        if self._held is None:
            return
        index, slot = self._held
        self._held = None
        self._next[index] = following
        if slot.used is not None:
            slot.used.record(torch.cuda.current_stream(self.device))
        self._free.append(slot)

    def _start(self, index: int) -> None:
        slot = self._free.popleft()
        self._coming.append((index, slot, self._reader.submit(self._bring, self._slices[index], slot)))

    def _bring(self, wanted: _Slice, slot: _Slot) -> None:
        source = self.store.view(wanted.offset, wanted.nbytes)
        if source is None:
            if slot.copied is not None:
                slot.copied.synchronize()  # the staging buffer's last copy has left
            source = slot.staging[: wanted.nbytes]
            self.store.read(wanted.offset, source)
            if slot.staging is slot.buffer:
                return
        buffer = slot.buffer[: wanted.nbytes]
        if slot.copied is None or slot.used is None or self._link is None:
            buffer.copy_(source)
            return
        with torch.cuda.stream(self._link):
            self._link.wait_event(slot.used)  # the device has done with what the buffer held
            buffer.copy_(source, non_blocking=True)
            slot.copied.record(self._link)

    def measure(self) -> float:
        """Bytes a second from the store to the device, over at most PROBE_BYTES of slices."""
        self.store.forget_cached()
        self.fetch(len(self._slices) - 1)  # the buffers' and the link's first use is slower
        start, moved = time.perf_counter(), 0
        for index, part in enumerate(self._slices):
            if moved >= PROBE_BYTES:
                break
            self.fetch(index)
            moved += part.nbytes
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return moved / (time.perf_counter() - start)

    def close(self) -> None:
        """Give the file or the host memory back. No fetch may follow."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.store.close()


@dataclass(frozen=True)
class StreamedWeight:
    """A matrix behind a WeightStream, in a format of config.STREAMED. `slices` pairs the index of each slice with its
    number of rows; scales are one a row and stay on the device."""

    stream: WeightStream
    shape: tuple[int, int]
    dtype: torch.dtype
    format: str
    slices: Sequence[tuple[int, int]]
    scale_N: torch.Tensor | None = None
    planes: None = None

    @property
    def nbytes(self) -> int:
        scales = 0 if self.scale_N is None else self.scale_N.nbytes
        return self.shape[0] * self.shape[1] * (self.dtype.itemsize if self.scale_N is None else 1) + scales

    def matmul(self, x_TK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
        y_TN = x_TK.new_empty(*x_TK.shape[:-1], self.shape[0])
        for rows, weight in self._parts():
            y_TN[..., rows] = weight.matmul(x_TK, None if bias_N is None else bias_N[rows])
        return y_TN

    def route(self, rows: int) -> tuple[str, str]:
        return f"copied to the device in {len(self.slices)} slices, each multiplied there", "the weights are offloaded"

    def unpack(self) -> torch.Tensor:
        return torch.cat([weight.unpack().clone() for _, weight in self._parts()])

    def _parts(self) -> Iterator[tuple[slice, DenseWeight | Int8Weight | FP8Weight]]:
        """Each slice's rows and weight, valid until the next is asked for."""
        first = 0
        for index, count in self.slices:
            rows = slice(first, first + count)
            raw = self.stream.fetch(index)
            shape = (count, self.shape[1])
            if self.scale_N is None:
                yield rows, DenseWeight(raw.view(self.dtype).view(shape))
            elif self.format == "int8":
                yield rows, Int8Weight(raw.view(torch.int8).view(shape), self.scale_N[rows], self.dtype)
            else:
                yield rows, FP8Weight(raw.view(torch.float8_e4m3fn).view(shape), self.scale_N[rows], self.dtype)
            first += count


@dataclass(frozen=True)
class StreamedTable:
    """An embedding table in a store, of which a step reads the rows it looks up."""

    store: Store
    offset: int
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def rows(self, ids_T: torch.Tensor) -> torch.Tensor:
        """[T, columns] on the device."""
        nbytes = self.shape[1] * self.dtype.itemsize
        rows_TB = torch.empty(ids_T.shape[0], nbytes, dtype=torch.uint8)
        for row_B, token in zip(rows_TB, ids_T.tolist(), strict=True):
            self.store.read(self.offset + token * nbytes, row_B)
        return rows_TB.view(self.dtype).to(self.device)


PACKERS: Mapping[str, Callable[[torch.Tensor], Int8Weight | FP8Weight]] = MappingProxyType(
    {"int8": pack_int8, "fp8": pack_fp8}
)


def stream_matrix(
    stream: WeightStream,
    pieces: Iterable[torch.Tensor],
    shape: tuple[int, int],
    *,
    dtype: torch.dtype,
    format: str,
) -> StreamedWeight:
    """Put a matrix into the stream's store, given in pieces of whole rows, and register its slices in their order."""
    offset, scales = stream.store.nbytes, []
    for values_RK in pieces:
        values_RK = values_RK.to(dtype)
        if format in PACKERS:
            packed = PACKERS[format](values_RK)
            stream.store.append(packed.q_NK)
            scales.append(packed.scale_N)
        else:
            stream.store.append(values_RK)
    scale_N = torch.cat(scales).to(stream.device) if scales else None
    return _stream_stored(stream, offset, shape, dtype, format, scale_N)


def stream_table(stream: WeightStream, table: StreamedTable, *, format: str) -> StreamedWeight:
    """A matrix over a table's values: the very bytes where they are dense, else a second copy in `format`."""
    if format == "dense":
        return _stream_stored(stream, table.offset, table.shape, table.dtype, format, None)
    ids = torch.arange(table.shape[0]).split(PIECE_ROWS)  # type: ignore[no-untyped-call]
    return stream_matrix(stream, (table.rows(part) for part in ids), table.shape, dtype=table.dtype, format=format)


def _stream_stored(
    stream: WeightStream,
    offset: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    format: str,
    scale_N: torch.Tensor | None,
) -> StreamedWeight:
    row_bytes = shape[1] * (dtype.itemsize if scale_N is None else 1)
    at_once = stream.slice_bytes // row_bytes
    if at_once == 0:
        raise OutOfMemoryError(
            f"a row of {row_bytes} bytes does not fit the {stream.slice_bytes} bytes that one slice of offloaded "
            "weights may take: raise the memory limit"
        )
    slices = []
    for first in range(0, shape[0], at_once):
        rows = min(at_once, shape[0] - first)
        slices.append((stream.add(offset + first * row_bytes, rows * row_bytes), rows))
    return StreamedWeight(stream, shape, dtype, format, tuple(slices), scale_N)
