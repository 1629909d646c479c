"""What a directory of weights holds beside them: config.json, and the index that says which shard has which tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paceline.errors import CheckpointError, UnsupportedModelError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a model directory needs {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. UnsupportedModelError for weights packed by another library, which would be read as nonsense."""
    config = read_json(directory / "config.json")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UnsupportedModelError(
            f"{directory}: the weights are quantised ({method}), which this version cannot read; use the original model"
        )
    return config


def read_generation_config(directory: Path) -> dict[str, Any]:
    """generation_config.json, {} where there is none."""
    path = directory / "generation_config.json"
    return read_json(path) if path.exists() else {}


def read_index(index: Path) -> dict[Path, list[str]]:
    """The shards that an index file lists, each with the tensors promised to be in it; all of them exist."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map'; download it again")
    shards: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: tensor '{name}' is said to be in {file!r}, not a file of the directory")
        shards.setdefault(index.parent / file, []).append(name)
    absent = [shard.name for shard in shards if not shard.exists()]
    if absent:
        raise CheckpointError(
            f"{index.parent}: {len(absent)} of {len(shards)} shards are missing, the first is {absent[0]}; "
            "download it again"
        )
    return shards


def check_shard(shard: Path, promised: list[str], found: dict[str, Any], index: str) -> None:
    """Raise CheckpointError for a tensor that the index promises and its shard has not."""
    missing = [name for name in promised if name not in found]
    if missing:
        raise CheckpointError(f"{shard}: tensor '{missing[0]}' is missing, though {index} lists it here")
