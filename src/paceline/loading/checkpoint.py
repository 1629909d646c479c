"""A checkpoint: named tensors and the model's configuration, whatever the files. Tensors are read one at a time."""

from __future__ import annotations

from collections.abc import Collection
from types import TracebackType
from typing import Any, Protocol

import torch

from paceline.loading.bin_checkpoint import BinCheckpoint, pickled_files
from paceline.loading.gguf_checkpoint import GGUFCheckpoint
from paceline.loading.resolve import ModelSource
from paceline.loading.safetensors_checkpoint import SafetensorsCheckpoint
from paceline.loading.upload import FileSpan
from paceline.log import get_logger

log = get_logger(__name__)


class Checkpoint(Protocol):
    """`config` and `generation_config` have the keys of Hugging Face's json files ({} where there is none); tensors
    have Hugging Face's names and values. `nbytes`: bytes of all tensors as stored."""

    config: dict[str, Any]
    generation_config: dict[str, Any]
    nbytes: int

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that read() returns: as stored, or float32 for GGUF's quantised types."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The values, maybe a view of the mapped file: copy before writing. CheckpointError if there are none."""
        ...

    def span(self, name: str) -> FileSpan | None:
        """Where a file holds just the values that read() returns; None where they are computed."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Checkpoint: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """Headers and configuration only; no tensor is read. Close it, or use it in a `with`.

    Raises CheckpointError for corrupt, truncated or missing files, UnsupportedModelError for weights we cannot read.
    """
    if source.kind == "gguf":
        return GGUFCheckpoint(source.path)
    pickles = pickled_files(source.path)
    if pickles and not any(source.path.glob("*.safetensors")):
        return BinCheckpoint(source.path)
    if pickles:
        log.info("%s: reading the safetensors files; %s beside them is not used", source.path, pickles[0].name)
    return SafetensorsCheckpoint(source.path)
