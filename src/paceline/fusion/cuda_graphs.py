"""Calls of one function captured in CUDA graphs, one for each set of shapes: the host launches one graph where it would
launch some hundred kernels.

`GraphPool` is bookkeeping and knows no CUDA; what it asks of a device is `Recorder`, and `CudaRecorder` is that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Lock
from typing import Any, Protocol

import torch

from paceline.fusion.dynamo import copy_all
from paceline.log import get_logger

log = get_logger(__name__)

Function = Callable[..., Sequence[Any]]
Key = tuple[Hashable, ...]

ALIGNMENT = 256  # bytes: where torch's own allocations begin, so that kernels find what they were compiled for
MOST_SEEN = 4096  # keys remembered without a graph
MOST_FAILURES = 16  # captures that fail before none is tried any more


class Recording(Protocol):
    """A captured call. `outputs` are what it returned; `replay` writes them anew."""

    @property
    def outputs(self) -> Sequence[Any]: ...

    def replay(self) -> None: ...


class Recorder(Protocol):
    """A device that captures calls, all in one pool of memory."""

    def capturing(self) -> bool:
        """Whether the caller is capturing a graph of its own."""
        ...

    def follow(self) -> None:
        """Let what is launched from now on wait for all that was launched through the recorder before."""
        ...

    def record(self, call: Callable[[], Sequence[Any]]) -> Recording:
        """Raises RuntimeError where the call cannot be captured."""
        ...

    def held_bytes(self) -> int:
        """Of the pool, which gives memory back only in `release`."""
        ...

    def release(self) -> None:
        """Give the pool back. No recording is left."""
        ...


@dataclass(frozen=True)
class Limits:
    """Of a GraphPool. `nbytes`: of the recorder's pool and the inputs' buffers."""

    graphs: int = 64
    nbytes: int = 2 << 30


@dataclass
class Counts:
    """Calls by graph and by the function itself; graphs captured, dropped for others, and pools given back."""

    replayed: int = 0
    eager: int = 0
    captured: int = 0
    evicted: int = 0
    released: int = 0


@dataclass(frozen=True)
class Entry:
    recording: Recording
    inputs: tuple[Any, ...]  # views of a buffer a dtype, and what is no tensor
    buffers: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Arena:
    """The buffers that graphs captured from now on read their inputs from, one for each dtype and device: graphs never
    run at the same time. A larger set of inputs gets larger buffers; graphs before it keep theirs."""

    buffers: dict[tuple[torch.dtype, torch.device], torch.Tensor] = field(default_factory=dict)

    def place(self, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]:
        """Views for such inputs, contiguous and one after the other, and the buffers that they lie in."""
        places: list[tuple[tuple[torch.dtype, torch.device], int] | None] = []
        ends: dict[tuple[torch.dtype, torch.device], int] = {}
        for value in inputs:
            if not isinstance(value, torch.Tensor):
                places.append(None)
                continue
            kind = (value.dtype, value.device)
            first = ends.get(kind, 0)
            places.append((kind, first))
            step = ALIGNMENT // value.element_size()
            ends[kind] = first + -(-value.numel() // step) * step
        for kind, end in ends.items():
            if kind not in self.buffers or self.buffers[kind].numel() < end:
                with torch.inference_mode(False):  # what is made inside it cannot be written outside
                    self.buffers[kind] = torch.empty(end, dtype=kind[0], device=kind[1])
        views = tuple(
            value if place is None else self.buffers[place[0]][place[1] : place[1] + value.numel()].view(value.shape)
            for value, place in zip(inputs, places, strict=True)
        )
        return views, tuple(self.buffers[kind] for kind in ends)


class GraphPool:
    """Calls `function` over tensors, and captures the call for shapes, dtypes and values of what is no tensor that it
    sees for the second time. Outputs are the caller's to keep, and have no gradients.

    `function` computes the same kernels for the same shapes, changes none of its inputs, and takes them contiguous.
    The first call of its kind is the function's own; so is one whose capture fails, from then on, with the reason in
    `failures`. The graph not used for longest makes room for another; memory comes back from all of them at once, so
    where it passes the limit all are dropped.
    """

    def __init__(self, function: Function, recorder: Recorder, limits: Limits | None = None) -> None:
        self._function = function
        self._recorder = recorder
        self._limits = limits or Limits()
        self._entries: OrderedDict[Key, Entry] = OrderedDict()  # the last used last
        self._seen: OrderedDict[Key, None] = OrderedDict()
        self._arena = Arena()
        self._lock = Lock()
        self.failures: dict[Key, str] = {}
        self.counts = Counts()

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Sequence[Any]:
        if self._recorder.capturing():
            return self._eager(inputs)
        key = (_autocast(), *(_signature(value) for value in inputs))
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                return self._replay(entry, inputs)
            if len(self.failures) == MOST_FAILURES or key in self.failures or not self._sighted(key):
                return self._eager(inputs)
            try:
                return self._capture(key, inputs)
            finally:
                if self._is_over():
                    self._drop_all()

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        with self._lock:
            self._drop_all()

    def check_invariants(self) -> None:
        """Raises AssertionError where what is held contradicts itself or the limits."""
        assert len(self._entries) <= self._limits.graphs
        assert len(self._seen) <= MOST_SEEN
        assert len(self.failures) <= MOST_FAILURES
        assert self.held_bytes() <= self._limits.nbytes
        assert not self._entries.keys() & self.failures.keys()
        assert self._entries or not self._recorder.held_bytes(), "memory without a graph"
        for key, entry in self._entries.items():
            assert tuple(_signature(value) for value in entry.inputs) == key[1:]
            tensors = [value for value in entry.inputs if isinstance(value, torch.Tensor) and value.numel()]
            spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors)
            assert all(end <= start for (_, end), (start, _) in pairwise(spans)), "inputs overlap"
            held = [(b.data_ptr(), b.data_ptr() + b.nbytes) for b in entry.buffers]
            for first, last in spans:
                assert any(low <= first and last <= high for low, high in held), "an input lies in no buffer"
            for buffer in entry.buffers:
                newest = self._arena.buffers[buffer.dtype, buffer.device]
                assert newest is buffer or newest.numel() > buffer.numel(), "a larger buffer made room for a smaller"

    def held_bytes(self) -> int:
        """Of the recorder's pool and of the inputs' buffers."""
        buffers = [*self._arena.buffers.values(), *(b for entry in self._entries.values() for b in entry.buffers)]
        return self._recorder.held_bytes() + sum({b.data_ptr(): b.nbytes for b in buffers}.values())

    def _eager(self, inputs: Sequence[Any]) -> Sequence[Any]:
        self.counts.eager += 1
        return self._function(*inputs)

    def _sighted(self, key: Key) -> bool:
        """Whether it was seen before; from now on it was."""
        before = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)
        return before

    def _replay(self, entry: Entry, inputs: Sequence[Any]) -> Sequence[Any]:
        self.counts.replayed += 1
        self._recorder.follow()
        _copy(inputs, entry.inputs)
        entry.recording.replay()
        return [value.clone() if isinstance(value, torch.Tensor) else value for value in entry.recording.outputs]

    def _capture(self, key: Key, inputs: Sequence[Any]) -> Sequence[Any]:
        """This call by the function itself, over the buffers: whatever is compiled or loaded at a first use is then
        there when the same is captured."""
        self._recorder.follow()
        while len(self._entries) >= self._limits.graphs:
            self._entries.popitem(last=False)
            self.counts.evicted += 1
        views, buffers = self._arena.place(inputs)
        _copy(inputs, views)
        outputs = _apart(self._eager(views), views)
        reason = self._record(key, views, buffers)
        if reason is None and self._is_over():
            self._drop_all()
            reason = self._record(key, *self._arena.place(inputs))
            if self._is_over():
                reason = f"its graph takes {self.held_bytes()} bytes, and the limit is {self._limits.nbytes}"
        if reason is not None:
            (log.info if self.failures else log.warning)("some calls run without a CUDA graph: %s", reason)
            self.failures[key] = reason
        return outputs

    def _is_over(self) -> bool:
        return self.held_bytes() > self._limits.nbytes

    def _record(self, key: Key, views: tuple[Any, ...], buffers: tuple[torch.Tensor, ...]) -> str | None:
        """Why that failed; None where it did not."""
        try:
            recording = self._recorder.record(lambda: self._function(*views))
        except RuntimeError as error:
            if not self._entries:
                self._recorder.release()
            return str(error).partition("\n")[0] or type(error).__name__
        self._entries[key] = Entry(recording, views, buffers)
        self.counts.captured += 1
        return None

    def _drop_all(self) -> None:
        self._entries.clear()
        self._arena.buffers.clear()
        self._recorder.release()
        self.counts.released += 1


def _signature(value: Any) -> Hashable:
    """With types: 1, 1.0 and True are equal in Python, and not to a function."""
    return (tuple(value.shape), value.dtype, value.device) if isinstance(value, torch.Tensor) else (type(value), value)


def _autocast() -> Hashable:
    """Autocast makes other dtypes of the same inputs."""
    return tuple(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in ("cuda", "cpu"))


def _copy(inputs: Sequence[Any], views: Sequence[Any]) -> None:
    copy_all([view for view in views if _is_tensor(view)], [value for value in inputs if _is_tensor(value)])


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _apart(outputs: Sequence[Any], views: Sequence[Any]) -> Sequence[Any]:
    """Outputs that are inputs, or views of them, lie in the buffers, which the next call writes."""
    memory = {view.untyped_storage().data_ptr() for view in views if isinstance(view, torch.Tensor)}
    return [
        value.clone() if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in memory else value
        for value in outputs
    ]


class CudaRecorder:
    """A device's graphs. What one of them leaves in the pool another may overwrite: they follow each other on whatever
    streams they are called."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._held = 0
        self._stream: torch.cuda.Stream | None = None  # of the last call

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def follow(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def record(self, call: Callable[[], Sequence[Any]]) -> Recording:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # so that what is reserved from here on is the pool's
        before = torch.cuda.memory_reserved(self._device)
        try:
            # On a stream of its own; another thread (a server's, a tokenizer's) may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = call()
        finally:
            self._held += max(0, torch.cuda.memory_reserved(self._device) - before)
        return CudaRecording(graph, outputs)

    def held_bytes(self) -> int:
        return self._held

    def release(self) -> None:
        torch.cuda.synchronize(self._device)
        self._pool, self._held = None, 0
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class CudaRecording:
    graph: torch.cuda.CUDAGraph
    outputs: Sequence[Any]

    def replay(self) -> None:
        self.graph.replay()
