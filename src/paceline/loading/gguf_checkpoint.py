"""A GGUF model as a checkpoint: Hugging Face names, values and configuration."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.loading.dequantize import DENSE, QUANTIZED, dequantize, value_dtype
from paceline.loading.gguf import GGUFFile, TensorInfo
from paceline.loading.gguf_config import generation_config, hf_config
from paceline.loading.gguf_layout import grouped, half_split
from paceline.loading.gguf_metadata import Metadata
from paceline.loading.gguf_names import (
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    Dialect,
    Layout,
    dialect_of,
    layout_of,
    to_hf,
)
from paceline.loading.gguf_split import read_model

ROW_LAYOUTS = ("query", "key", "fused")
# Dimensions that a tensor of each layout may have.
DIMS = {"stacked": (2, 3), "transposed": (2,), "unit_offset": (1,)}


@dataclass(frozen=True)
class Place:
    """Where a Hugging Face tensor is: in which GGUF tensor, at which `index` of its first dimension if it is stacked
    with others, and how it lies there."""

    info: TensorInfo
    layout: Layout | None
    index: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Hugging Face's."""
        shape = self.info.shape if self.index is None else self.info.shape[1:]
        return shape[::-1] if self.layout == "transposed" else shape


class GGUFCheckpoint:
    """See checkpoint.Checkpoint. `path` is the file or any part of a split one. The files are mapped privately: nothing
    is held but the tensors that read() gave out."""

    def __init__(self, path: Path) -> None:
        file = read_model(path)
        metadata = Metadata(file.path, file.metadata)
        dialect = dialect_of(metadata.architecture, file.tensors.keys())
        self._path = file.path
        self._places = _places(file, dialect)
        if dialect.embedding not in self._places:
            raise CheckpointError(f"{file.path}: tensor 'token_embd.weight' is missing; download the file again")
        self._heads = metadata.integer("attention.head_count")
        self._kv_heads = metadata.integer("attention.head_count_kv", self._heads)
        self._maps: dict[Path, torch.Tensor] | None = {
            part: _map(part) for part in dict.fromkeys(info.path for info in file.tensors.values())
        }
        self.metadata = file.metadata
        shapes = {name: place.shape for name, place in self._places.items()}
        factors = {
            name: self._values(Place(file.tensors[name], None)).flatten().tolist()
            for name in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)
            if name in file.tensors
        }
        self.config: dict[str, Any] = hf_config(metadata, dialect, shapes, factors)
        self.generation_config: dict[str, Any] = generation_config(file.metadata)
        self.nbytes = sum(file.tensors[name].nbytes for name in file.tensors if name not in factors)

    def names(self) -> Collection[str]:
        return self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._place(name).shape

    def dtype(self, name: str) -> torch.dtype:
        place = self._place(name)
        return torch.float32 if place.layout == "unit_offset" else _value_dtype(place.info)

    def read(self, name: str) -> torch.Tensor:
        """Values in Hugging Face's order and convention; a view of the mapped file where it already holds them."""
        place = self._place(name)
        values = self._values(place)
        return values.float() - 1 if place.layout == "unit_offset" else values

    def span(self, name: str) -> None:
        return None

    def close(self) -> None:
        """Let go of the mapping. Tensors already read stay valid."""
        self._maps = None

    def __enter__(self) -> GGUFCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _place(self, name: str) -> Place:
        try:
            return self._places[name]
        except KeyError:
            raise CheckpointError(f"{self._path}: tensor '{name}' is missing") from None

    def _values(self, place: Place) -> torch.Tensor:
        _value_dtype(place.info)
        values = dequantize(self._rows(place), place.info.type)
        return values.t() if place.layout == "transposed" else values.view(place.shape)

    def _rows(self, place: Place) -> torch.Tensor:
        """The stored bytes, uint8 [rows, bytes of a row], rows in Hugging Face's order."""
        info = place.info
        if self._maps is None:
            raise CheckpointError(f"{info.path}: tensor {info.name!r} was read after close()")
        raw = self._maps[info.path][info.offset : info.offset + info.nbytes]
        if place.index is not None:
            raw = raw.view(info.shape[0], -1)[place.index]
        if len(place.shape) == 1:
            rows = raw.view(1 if place.layout not in ROW_LAYOUTS else info.shape[0], -1)
        else:
            rows = raw.view(info.shape[-2], -1)
        try:
            if place.layout == "query":
                return half_split(rows, self._heads)
            if place.layout == "key":
                return half_split(rows, self._kv_heads)
            if place.layout == "fused":
                return grouped(rows, self._heads, self._kv_heads)
        except ValueError as error:
            raise CheckpointError(f"{info.path}: tensor {info.name!r} has {error}: download the file again") from error
        return rows


def _places(file: GGUFFile, dialect: Dialect) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for info in file.tensors.values():
        if info.name in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS):
            continue
        name, layout = to_hf(dialect, info.name), layout_of(dialect, info.name)
        if name is None:
            architecture = file.metadata["general.architecture"]
            raise UnsupportedModelError(
                f"{info.path}: tensor {info.name!r} has no place in a '{architecture}' model that paceline knows; "
                "use the model's safetensors files"
            )
        quantised_rows = layout in ROW_LAYOUTS and len(info.shape) == 1 and info.type.elements > 1
        if len(info.shape) not in DIMS.get(layout or "", (1, 2)) or quantised_rows:
            raise CheckpointError(
                f"{info.path}: tensor {info.name!r} of type {info.type.name} has the impossible shape "
                f"{list(info.shape)}; download the file again"
            )
        _value_dtype(info)
        if layout == "stacked":
            places |= {name.replace("{e}", str(e)): Place(info, layout, e) for e in range(info.shape[0])}
        else:
            places[name] = Place(info, layout)
    return places


def _value_dtype(info: TensorInfo) -> torch.dtype:
    dtype = value_dtype(info.type.name)
    if dtype is None:
        raise UnsupportedModelError(
            f"{info.path}: tensor {info.name!r} is stored as {info.type.name}, which this version cannot read; "
            f"use a file of one of the types {', '.join([*DENSE, *QUANTIZED])}"
        )
    return dtype


def _map(path: Path) -> torch.Tensor:
    try:
        return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be mapped into memory ({error})") from error
