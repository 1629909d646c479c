"""Where the weights of a model larger than its device stay, and what that costs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from paceline import sizing
from paceline.config import DecoderConfig
from paceline.engine.device import available_bytes
from paceline.errors import OutOfMemoryError, UsageError
from paceline.formats import stored_bytes
from paceline.formats.stores import DiskStore, HostStore, Store
from paceline.formats.streamed import AHEAD, WeightStream
from paceline.loading.wheel import cache_dir
from paceline.log import get_logger

log = get_logger(__name__)

HOST_SHARE = 0.8  # of the host memory available, that pinned weights may take
SLICE_BYTES = 64 << 20  # the largest slice: 2.5 ms of a PCIe 4 link, 30 ms of a fast disk
STREAM_SHARE = 0.5  # of the memory left by what must stay on the device; the cache has the rest


@dataclass(frozen=True)
class OffloadedWeights:
    """Bytes of weights that stay on the device, and of those that are streamed to it."""

    resident: int
    streamed: int


def offloaded_weights(config: DecoderConfig, format: str, dtype: torch.dtype) -> OffloadedWeights:
    """Matrices and the token embedding are streamed; norms, biases, routers, learned positions and the scales of
    int8 and fp8 stay."""
    stored = stored_bytes(format, dtype)
    weights = sizing.weight_bytes(config, dtype.itemsize, stored, tied_head_shares=format == "dense")
    table = config.vocab_size * config.hidden_size
    streamed = weights.layers + weights.experts + weights.head + table * dtype.itemsize
    values = sum(m.num_values for m in sizing.layer_matrices(config)) + table
    scales = 0 if format == "dense" else weights.layers + weights.experts + weights.head - values
    return OffloadedWeights(weights.total - streamed + scales, streamed - scales)


def open_stream(total: int, place: str, directory: str | None, *, device: torch.device, free: int) -> WeightStream:
    """A stream for `total` bytes of weights to a device that has `free` bytes for it and for the cache.

    `place`: "host" memory, "disk" (a file in `directory`, by default the cache's), or "auto": host memory where that
    is not the device itself and has room, else disk. Raises OutOfMemoryError where neither has.
    """
    slice_bytes = min(SLICE_BYTES, int(free * STREAM_SHARE) // (1 + AHEAD))
    store = open_store(place, directory, total, device)
    log.info("offload: %s of weights in %s, slices of %d bytes", sizing.gib(total), store.kind, slice_bytes)
    return WeightStream(store, slice_bytes, device)


def open_store(place: str, directory: str | None, total: int, device: torch.device) -> Store:
    """Room for `total` bytes: see open_stream."""
    if device.type == "cpu":
        if place == "host":
            raise UsageError("offload='host' keeps weights in host memory, where a model on the CPU has them anyway")
    elif place != "disk":
        room = int(available_bytes(torch.device("cpu")) * HOST_SHARE)
        if total <= room:
            return HostStore(total, pinned=True)
        if place == "host":
            raise OutOfMemoryError(
                f"offload='host' needs {sizing.gib(total)} of host memory, and {sizing.gib(room)} may be taken: "
                "use offload='disk'"
            )
    where = Path(directory).expanduser() if directory else cache_dir() / "offload"
    existing = next(path for path in (where, *where.parents) if path.exists())
    room = shutil.disk_usage(existing).free
    if total > room:
        raise OutOfMemoryError(
            f"offload needs {sizing.gib(total)} on disk, and {where} has {sizing.gib(room)}: name another offload_dir"
        )
    return DiskStore(where)


def tell_speed(stream: WeightStream, step_bytes: int) -> None:
    """Measure the stream, and say what reading will take of a step."""
    rate = stream.measure()
    seconds = step_bytes / rate
    log.warning(
        "offload: every step reads %s from %s, measured at %.2f GB/s: %.2g s of reading a step, or %.2g tokens/s for "
        "one request (requests run together share the reading%s)",
        sizing.gib(step_bytes),
        stream.store.kind,
        rate / 1e9,
        seconds,
        1 / seconds,
        "; what the system caches of the file comes faster" if stream.store.kind == "disk" else "",
    )
