"""A GGUF model in one file or, as llama.cpp's gguf-split writes it, in several: `name-00001-of-00003.gguf` and so on.

The first part holds all metadata. Every part has `split.no` (from 0), `split.count` and the whole model's
`split.tensors.count`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from paceline.errors import CheckpointError
from paceline.loading.gguf import GGUFFile, TensorInfo, read_gguf

PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def parts_of(path: Path) -> list[Path]:
    """The files of the model that `path` is or is a part of, in order, by its name alone; those that exist or not."""
    match = PART_NAME.fullmatch(path.name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [path]
    count = int(match["count"])
    return [path.with_name(_part_name(match["stem"], index, count)) for index in range(count)]


def first_part(path: Path) -> Path:
    """The file that holds the metadata of the model that `path` is or is a part of.

    Raises CheckpointError naming the first of its parts that is missing.
    """
    parts = parts_of(path)
    for number, part in enumerate(parts, 1):
        if not part.exists():
            raise CheckpointError(
                f"{part}: this part of a split GGUF model ({number} of {len(parts)}) is missing: download it"
            )
    return parts[0]


def read_model(path: str | Path) -> GGUFFile:
    """Metadata and tensor table of a GGUF model, given its file or any of its parts.

    Raises CheckpointError if a part is missing, cannot be read, or does not belong to the others.
    """
    first = first_part(Path(path))
    files = [read_gguf(part) for part in parts_of(first)]
    _check_numbers(files)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in file.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{file.path}: tensor {name!r} is also in {tensors[name].path.name}: "
                    "these are parts of different models; download them again"
                )
            tensors[name] = info
    expected = _number(files[0], "split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise CheckpointError(
            f"{first}: the parts hold {len(tensors)} tensors, not the {expected} that the whole model has: "
            "they are parts of different models; download them again"
        )
    return GGUFFile(files[0].path, files[0].version, files[0].metadata, tensors)


def _check_numbers(files: list[GGUFFile]) -> None:
    """Every file must say of itself what its name says of it."""
    for number, file in enumerate(files):
        count, index = _number(file, "split.count", 1), _number(file, "split.no", 0)
        if len(files) == 1 and count > 1:
            raise CheckpointError(
                f"{file.path}: part {index + 1} of {count} of a split GGUF model, renamed: "
                f"call its parts as they were, as in '{_part_name(file.path.stem, index, count)}'"
            )
        if (count, index) != (len(files), number) and not (len(files) == 1 and count == 0):
            raise CheckpointError(
                f"{file.path}: its name says part {number + 1} of {len(files)}, its header {index + 1} of {count}: "
                "rename it back, or download it again"
            )


def _number(file: GGUFFile, key: str, default: int) -> int:
    value: Any = file.metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"{file.path}: metadata key '{key}' is {str(value)[:40]!r}, expected a whole number")
    return value


def _part_name(stem: str, index: int, count: int) -> str:
    return f"{stem}-{index + 1:05d}-of-{count:05d}.gguf"
