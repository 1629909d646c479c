"""A GGUF file as a checkpoint: Hugging Face names, values and configuration."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from paceline.errors import CheckpointError, UnsupportedModelError
from paceline.loading.dequantize import DENSE, QUANTIZED, dequantize, value_dtype
from paceline.loading.gguf import GGUFFile, TensorInfo, read_gguf
from paceline.loading.gguf_config import Metadata, generation_config, hf_config
from paceline.loading.gguf_names import ROPE_FACTORS, has_unit_offset, rope_heads, to_hf


class GGUFCheckpoint:
    """See checkpoint.Checkpoint. The file is mapped privately: nothing is held but the tensors that read() gave out."""

    def __init__(self, path: Path) -> None:
        self._file = read_gguf(path)
        _refuse_split(self._file)
        metadata = Metadata(path, self._file.metadata)
        self._architecture: str = metadata.architecture
        self._tensors = _by_hf_name(self._file, self._architecture)
        self.metadata = self._file.metadata
        self._raw: torch.Tensor | None = _map(path)
        factors = self._file.tensors.get(ROPE_FACTORS)
        shapes = {name: info.shape for name, info in self._tensors.items()}
        if "model.embed_tokens.weight" not in shapes:
            raise CheckpointError(f"{path}: tensor 'token_embd.weight' is missing")
        self.config: dict[str, Any] = hf_config(
            metadata, shapes, self._values(factors).flatten().tolist() if factors else None
        )
        self.generation_config: dict[str, Any] = generation_config(self._file.metadata)
        self.nbytes = sum(info.nbytes for info in self._tensors.values())

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        info = self._info(name)
        if has_unit_offset(self._architecture, info.name):
            return torch.float32
        return _value_dtype(self._file.path, info)

    def read(self, name: str) -> torch.Tensor:
        """Values in Hugging Face's order and convention; a view of the mapped file where it already holds them."""
        info = self._info(name)
        values = self._values(info)
        return values.float() - 1 if has_unit_offset(self._architecture, info.name) else values

    def blocks(self, name: str) -> tuple[torch.Tensor, str]:
        """The stored bytes, uint8 [rows, bytes of a row] in Hugging Face's row order, and their GGUF type's name."""
        info = self._info(name)
        return self._rows(info), info.type.name

    def close(self) -> None:
        """Let go of the mapping. Tensors already read stay valid."""
        self._raw = None

    def __enter__(self) -> GGUFCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self._file.path}: tensor '{name}' is missing") from None

    def _values(self, info: TensorInfo) -> torch.Tensor:
        _value_dtype(self._file.path, info)
        return dequantize(self._rows(info), info.type).view(info.shape)

    def _rows(self, info: TensorInfo) -> torch.Tensor:
        if self._raw is None:
            raise CheckpointError(f"{self._file.path}: tensor '{info.name}' was read after close()")
        bias = info.name.endswith(".bias")
        rows = info.shape[0] if len(info.shape) > 1 or bias else 1
        raw = self._raw[info.offset : info.offset + info.nbytes].view(rows, -1)
        config = self._file.metadata
        heads = rope_heads(
            self._architecture,
            info.name,
            config[f"{self._architecture}.attention.head_count"],
            config.get(f"{self._architecture}.attention.head_count_kv")
            or config[f"{self._architecture}.attention.head_count"],
        )
        return raw if heads is None else half_split(raw, heads, self._file.path, info.name)


def half_split(rows: torch.Tensor, heads: int, path: Path, name: str) -> torch.Tensor:
    """Rows [heads * head_dim, ...] from interleaved to half-split rotary order: of a head, row 2j goes to j and row
    2j + 1 to j + head_dim/2."""
    if rows.shape[0] % (2 * heads):
        raise CheckpointError(f"{path}: tensor '{name}' has {rows.shape[0]} rows, not a multiple of 2 x {heads} heads")
    pairs = rows.view(heads, rows.shape[0] // heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(rows.shape)


def _refuse_split(file: GGUFFile) -> None:
    parts = file.metadata.get("split.count", 1)
    if parts not in (0, 1):
        part = file.metadata.get("split.no", 0)
        shown = part + 1 if isinstance(part, int) else part
        raise UnsupportedModelError(
            f"{file.path}: part {shown} of {parts} of a split GGUF file, which this version cannot read: "
            "merge it with llama.cpp's llama-gguf-split --merge"
        )


def _by_hf_name(file: GGUFFile, architecture: str) -> dict[str, TensorInfo]:
    tensors = {}
    for info in file.tensors.values():
        if info.name == ROPE_FACTORS:
            continue
        name = to_hf(architecture, info.name)
        if name is None:
            raise UnsupportedModelError(
                f"{file.path}: tensor '{info.name}' has no place in a '{architecture}' model that paceline knows"
            )
        _value_dtype(file.path, info)
        tensors[name] = info
    return tensors


def _value_dtype(path: Path, info: TensorInfo) -> torch.dtype:
    dtype = value_dtype(info.type.name)
    if dtype is None:
        raise UnsupportedModelError(
            f"{path}: tensor '{info.name}' is stored as {info.type.name}, which this version cannot read; "
            f"use a file of one of the types {', '.join([*DENSE, *QUANTIZED])}"
        )
    return dtype


def _map(path: Path) -> torch.Tensor:
    try:
        return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be mapped into memory ({error})") from error
