"""Where weights lie that stay off the device: host memory, or a file.

A store is written once, end to end, while the model loads, and read at any offset afterwards.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch

from paceline.errors import CheckpointError, OutOfMemoryError
from paceline.sizing import gib


class Store(Protocol):
    """Bytes that are written once and read at any offset."""

    kind: str
    nbytes: int

    def append(self, values: torch.Tensor) -> int:
        """Keep a tensor's bytes; the offset at which they lie."""
        ...

    def view(self, offset: int, nbytes: int) -> torch.Tensor | None:
        """The bytes themselves, uint8, where they lie in memory."""
        ...

    def read(self, offset: int, into: torch.Tensor) -> None:
        """Fill `into`, uint8 on the CPU, from `offset` on."""
        ...

    def forget_cached(self) -> None:
        """Let the next reads come from where the bytes really are, as they will in a model larger than memory."""
        ...

    def close(self) -> None: ...


class HostStore:
    """Bytes in host memory; `pinned` lets a GPU fetch them without the CPU's help."""

    kind = "host memory"

    def __init__(self, capacity: int, *, pinned: bool) -> None:
        self._bytes = torch.empty(capacity, dtype=torch.uint8)
        self._pinned = pinned
        if pinned:  # not torch's pinned memory, whose allocator rounds up to a power of two
            error = torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), capacity, 0)  # type: ignore[no-untyped-call]
            if int(error) != 0:
                raise OutOfMemoryError(
                    f"{gib(capacity)} of host memory cannot be pinned (CUDA error {int(error)}): use offload='disk'"
                )
        self.nbytes = 0

    def append(self, values: torch.Tensor) -> int:
        flat = values.contiguous().view(-1).view(torch.uint8)
        offset, self.nbytes = self.nbytes, self.nbytes + flat.numel()
        self._bytes[offset : self.nbytes].copy_(flat)
        return offset

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        return self._bytes[offset : offset + nbytes]

    def read(self, offset: int, into: torch.Tensor) -> None:
        into.copy_(self.view(offset, into.numel()))

    def forget_cached(self) -> None:
        pass

    def close(self) -> None:
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())  # type: ignore[no-untyped-call]
            self._pinned = False


class DiskStore:
    """Bytes in an unnamed file of `directory`, gone when the process ends however it ends."""

    kind = "disk"

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  # lives as long as the store
        except OSError as error:
            raise CheckpointError(f"{directory}: no file for offloaded weights can be made there ({error})") from error
        self.nbytes = 0

    def append(self, values: torch.Tensor) -> int:
        flat = values.cpu().contiguous().view(-1).view(torch.uint8)
        rest = flat.numpy().data
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OutOfMemoryError(
                f"offloaded weights cannot be written ({error}): name a directory with room in offload_dir"
            ) from error
        offset, self.nbytes = self.nbytes, self.nbytes + flat.numel()
        return offset

    def view(self, offset: int, nbytes: int) -> None:
        return None

    def read(self, offset: int, into: torch.Tensor) -> None:
        target = into.numpy().data
        while target:
            count = os.preadv(self._file.fileno(), [target], offset)
            if count == 0:
                raise CheckpointError("the file of offloaded weights ended early: something else has cut it")
            target, offset = target[count:], offset + count

    def forget_cached(self) -> None:
        os.fsync(self._file.fileno())
        with suppress(AttributeError, OSError):  # not everywhere, and only ever a hint
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self._file.close()
