"""A directory of safetensors files as a checkpoint: one file, or shards listed by model.safetensors.index.json.

A file is a u64 header length, a JSON header {name: {dtype, shape, data_offsets}}, and the data, which the header must
cover exactly. Headers are checked here, so that a bad file is named before anything is read; the tensors come from the
safetensors library as views of the mapped file, so that memory holds what the caller keeps and no more.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.loading.directory import check_shard, read_config, read_generation_config, read_index
from paceline.loading.upload import FileSpan

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # in the file
    nbytes: int


class SafetensorsCheckpoint:
    """See checkpoint.Checkpoint."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.config = read_config(directory)
        self.generation_config = read_generation_config(directory)
        self._entries = _entries(directory)
        self._open: dict[Path, Any] = {}
        self.nbytes = sum(entry.nbytes for entry in self._entries.values())

    def names(self) -> Collection[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def read(self, name: str) -> torch.Tensor:
        entry = self._entry(name)
        try:
            if entry.file not in self._open:
                self._open[entry.file] = safe_open(entry.file, framework="pt")
            tensor: torch.Tensor = self._open[entry.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{entry.file}: tensor '{name}' cannot be read ({error})") from error
        return tensor

    def span(self, name: str) -> FileSpan | None:
        entry = self._entry(name)
        return FileSpan(entry.file, entry.offset, entry.nbytes) if sys.byteorder == "little" else None

    def close(self) -> None:
        """Let go of the files. Tensors already read stay valid."""
        self._open.clear()

    def __enter__(self) -> SafetensorsCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self._directory}: tensor '{name}' is missing") from None


def _entries(directory: Path) -> dict[str, _Entry]:
    shards = _shards(directory)
    entries: dict[str, _Entry] = {}
    for file, expected in shards.items():
        found = read_header(file)
        check_shard(file, expected, found, INDEX)
        entries.update({name: found[name] for name in expected} if expected else found)
    return entries


def _shards(directory: Path) -> dict[Path, list[str]]:
    """The files of the checkpoint, each with the tensors that the index promises; an empty list takes all of them."""
    if (directory / SINGLE).exists():
        return {directory / SINGLE: []}
    if (directory / INDEX).exists():
        return read_index(directory / INDEX)
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return {files[0]: []}
    if files:
        raise CheckpointError(f"{directory}: {len(files)} safetensors files but no {INDEX}; download it again")
    raise CheckpointError(f"{directory}: no weights (expected {SINGLE} or {INDEX})")


def read_header(file: Path) -> dict[str, _Entry]:
    """Every tensor of one safetensors file, checked: sane header, data exactly as long as the header says."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{file}: a header of {length} bytes in a file of {size}: corrupt or truncated; download it again"
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: its header is not JSON ({error}); download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its header is not a JSON object; download it again")
    header.pop("__metadata__", None)
    entries, end = {}, 0
    for name, fields in header.items():
        entries[name], last = _entry(file, 8 + length, name, fields)
        end = max(end, last)
    expected = 8 + length + end
    if size != expected:
        state = "truncated" if size < expected else "longer than its header says"
        raise CheckpointError(f"{file}: {state}: {size} bytes, expected {expected}; download it again")
    return entries


def _entry(file: Path, start: int, name: str, fields: Any) -> tuple[_Entry, int]:
    """The entry, and where its data ends, from the start of all data, which is at byte `start` of the file."""
    try:
        kind, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        sane = all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        sane = False
    if not sane:
        raise CheckpointError(f"{file}: the header's entry for tensor '{name}' is corrupt; download it again")
    if kind not in DTYPES:
        raise UnsupportedModelError(f"{file}: tensor '{name}' has dtype {kind}, which this version cannot read")
    nbytes = math.prod(shape) * DTYPES[kind].itemsize
    if end - begin != nbytes:
        raise CheckpointError(
            f"{file}: tensor '{name}' of shape {list(shape)} and dtype {kind} needs {nbytes} bytes, "
            f"its header gives {end - begin}"
        )
    return _Entry(file, DTYPES[kind], shape, start + begin, nbytes), end
