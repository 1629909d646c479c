"""What a model is, from its config.json and the headers of its weights: nothing else is read or downloaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paceline.errors import UsageError
from paceline.loading.aliases import ALIASES
from paceline.loading.checkpoint import open_checkpoint
from paceline.loading.directory import read_json
from paceline.loading.hub import fetch_description
from paceline.loading.resolve import HUB_ID, ModelSource, not_found, resolve
from paceline.loading.safetensors_checkpoint import DTYPES
from paceline.loading.wheel import cache_dir, cached_model

WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class Description:
    """`config`: what config.json says, or a GGUF file's metadata in its keys. `stored`: values of each dtype, by
    torch's name, as the headers say; {} where there were none to read. `note`: where all this is from."""

    name: str
    config: Mapping[str, Any]
    stored: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

    @property
    def stored_dtype(self) -> str:
        """The dtype that most values have; config.json's word where there are no headers, else float32, as
        transformers takes it."""
        if self.stored:
            return max(self.stored, key=lambda name: self.stored[name])
        return str(self.config.get("torch_dtype") or self.config.get("dtype") or "float32").removeprefix("torch.")


def describe(
    model: str, *, revision: str | None = None, token: str | None = None, download_dir: str | None = None
) -> Description:
    """Describe a config.json, a directory (weights are not needed), a GGUF file, a hub id or an alias.

    Raises ModelNotFoundError for a name that is nothing, DownloadError where the hub cannot be asked, CheckpointError
    for files that are corrupt.
    """
    path = Path(model).expanduser()
    if path.suffix == ".json" and path.is_file():
        return Description(model, read_json(path), note=f"{path} alone")
    if model and path.is_dir() and not any(any(path.glob(pattern)) for pattern in WEIGHT_FILES):
        return Description(model, read_json(path / "config.json"), note=f"{path}/config.json alone")
    if model and (path.exists() or (model not in ALIASES and not HUB_ID.fullmatch(model))):
        return _of_files(model, resolve(model))
    hub_id, at = model, revision
    if model in ALIASES:
        alias = ALIASES[model]
        if alias.wheel is not None and revision is None:
            root = Path(download_dir).expanduser() if download_dir else cache_dir()
            if cached := cached_model(root, alias.wheel):
                return _of_files(model, ModelSource(model, alias.wheel.kind, cached))
        hub_id = alias.hub_id
    match = HUB_ID.fullmatch(hub_id)
    if match is None:
        raise not_found(model)
    if at and match["revision"] and at != match["revision"]:
        raise UsageError(f"'{model}' names one revision and revision='{at}' another: give one of them")
    fetched = fetch_description(match["repo"], match["revision"] or at, token, download_dir)
    counts: Counter[str] = Counter()
    for kind, count in fetched.stored.items():
        counts[str(DTYPES[kind]).removeprefix("torch.") if kind in DTYPES else kind] += count
    return Description(model, read_json(fetched.config), counts, fetched.note)


def _of_files(model: str, source: ModelSource) -> Description:
    """A checkpoint on this machine: its headers are read and checked, its tensors are not."""
    with open_checkpoint(source) as checkpoint:
        counts: Counter[str] = Counter()
        for name in checkpoint.names():
            counts[str(checkpoint.dtype(name)).removeprefix("torch.")] += math.prod(checkpoint.shape(name))
        return Description(model, checkpoint.config, counts, f"headers of {source.path}")
