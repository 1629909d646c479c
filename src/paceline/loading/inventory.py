"""Which models lie on this disk, in the hub's cache and in ours, and their deletion. No network is asked."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from paceline.errors import ModelNotFoundError, PacelineError
from paceline.loading.aliases import ALIASES
from paceline.loading.hub import folder_bytes
from paceline.loading.wheel import cache_dir
from paceline.registry import unknown

if TYPE_CHECKING:
    from huggingface_hub import DeleteCacheStrategy, HFCacheInfo

SHORTEST_COMMIT = 6  # characters of a commit that name it
PARTIAL = ".partial"  # loading/wheel.py


@dataclass(frozen=True)
class CachedRevision:
    """One version's files. `path`: the folder, or the GGUF file or directory of a wheel. `commit` is "" for a wheel."""

    commit: str
    refs: tuple[str, ...]
    path: Path
    nbytes: int


@dataclass(frozen=True)
class CachedModel:
    """`name`: a hub id, or package==version. `nbytes`: all that deleting it frees; its revisions may share files, and
    unfinished downloads count. `last_used`: seconds since 1970. `folder`: what holds it all."""

    name: str
    kind: Literal["hub", "wheel"]
    revisions: tuple[CachedRevision, ...]
    nbytes: int
    last_used: float
    folder: Path


@dataclass(frozen=True)
class Inventory:
    """`warnings`: entries that cannot be read, one line each."""

    models: tuple[CachedModel, ...]
    warnings: tuple[str, ...]
    hub_cache: Path
    own_cache: Path


@dataclass(frozen=True)
class Selection:
    """A model, or of one from the hub some revisions. `nbytes`: what deleting it frees."""

    model: CachedModel
    revisions: tuple[CachedRevision, ...]
    nbytes: int


def take_inventory() -> Inventory:
    """What both caches hold, the hub's (HF_HOME, HF_HUB_CACHE) and ours (PACELINE_CACHE), by name."""
    from huggingface_hub import constants

    hub_cache, own_cache = Path(constants.HF_HUB_CACHE), cache_dir() / "models"
    info = _scan(hub_cache)
    models = [*([] if info is None else _hub_models(info)), *_wheel_models(own_cache)]
    warnings = () if info is None else tuple(" ".join(str(warning).split()) for warning in info.warnings)
    return Inventory(tuple(sorted(models, key=lambda model: model.name.lower())), warnings, hub_cache, own_cache)


def _scan(hub_cache: Path) -> HFCacheInfo | None:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return scan_cache_dir(hub_cache)
    except CacheNotFound:
        return None
    except ValueError as error:  # a file lies there
        raise PacelineError(f"the hub's cache {hub_cache} cannot be read: {error}") from error


def _hub_models(info: HFCacheInfo) -> list[CachedModel]:
    models = []
    for repo in info.repos:
        if repo.repo_type != "model":
            continue
        newest_first = sorted(repo.revisions, key=lambda found: found.last_modified, reverse=True)
        revisions = tuple(
            CachedRevision(found.commit_hash, tuple(sorted(found.refs)), found.snapshot_path, found.size_on_disk)
            for found in newest_first
        )
        unfinished = sum(path.lstat().st_size for path in (repo.repo_path / "blobs").glob("*.incomplete"))
        nbytes = repo.size_on_disk + unfinished
        models.append(CachedModel(repo.repo_id, "hub", revisions, nbytes, repo.last_accessed, repo.repo_path))
    return models


def _wheel_models(own_cache: Path) -> list[CachedModel]:
    wheels = [alias.wheel for alias in ALIASES.values() if alias.wheel is not None]
    names = {f"{wheel.package}-{wheel.version}": wheel.requirement for wheel in wheels}
    folders = {path.with_name(path.name.removesuffix(PARTIAL)) for path in own_cache.glob("*") if path.is_dir()}
    models = []
    for folder in folders:
        files = sorted([*folder.glob("*.gguf"), *folder.glob("*/config.json")])
        nbytes = sum(folder_bytes(part) for part in _wheel_folders(folder))
        used = max((max(file.stat().st_atime, file.stat().st_mtime) for file in files), default=0.0)
        revisions = tuple(_wheel_revision(file) for file in files)
        name = names.get(folder.name, "==".join(folder.name.rsplit("-", 1)))
        models.append(CachedModel(name, "wheel", revisions, nbytes, used, folder))
    return models


def _wheel_revision(file: Path) -> CachedRevision:
    """Of a GGUF file, or of the directory that a config.json tells of."""
    if file.name == "config.json":
        return CachedRevision("", (), file.parent, folder_bytes(file.parent))
    return CachedRevision("", (), file, file.stat().st_size)


def _wheel_folders(folder: Path) -> list[Path]:
    """The folder of a wheel's model and that of its unfinished download, where they are."""
    return [path for path in (folder, folder.with_name(f"{folder.name}{PARTIAL}")) if path.exists()]


# ------------------------------------------------------------------------------------------------------- by name


def select(inventory: Inventory, name: str) -> list[Selection]:
    """What `name` stands for on this disk: an alias (its files from the hub and its wheel), a hub id, org/name@revision
    for one revision (a branch, a tag or a commit's first characters), package==version or package.

    Raises ModelNotFoundError for a name of nothing that is here, with the nearest name that is.
    """
    repo, _, revision = name.partition("@")
    wanted = {repo}
    if repo in ALIASES:
        alias = ALIASES[repo]
        wanted |= {alias.hub_id} | ({alias.wheel.requirement} if alias.wheel is not None else set())
    models = [model for model in inventory.models if {model.name, model.name.split("==")[0]} & wanted]
    if not models:
        if repo in ALIASES:
            raise ModelNotFoundError(f"'{name}' is not on this disk: paceline models pull {name} fetches it")
        known = {*(model.name for model in inventory.models), *ALIASES}
        raise ModelNotFoundError(f"{unknown('model', name, known)}; paceline models lists what is here")
    if not revision:
        return [Selection(model, model.revisions, model.nbytes) for model in models]
    selections = [_one_revision(inventory, model, revision) for model in models if model.kind == "hub"]
    found = [selection for selection in selections if selection is not None]
    if not found:
        here = ", ".join(label(entry) for model in models for entry in model.revisions) or "none"
        raise ModelNotFoundError(f"'{repo}' has no revision '{revision}' on this disk: here are {here}")
    return found


def _one_revision(inventory: Inventory, model: CachedModel, name: str) -> Selection | None:
    for entry in model.revisions:
        if name in entry.refs or (len(name) >= SHORTEST_COMMIT and entry.commit.startswith(name)):
            if len(model.revisions) == 1:
                return Selection(model, model.revisions, model.nbytes)
            chosen = Selection(model, (entry,), 0)
            return replace(chosen, nbytes=_strategy(inventory, chosen).expected_freed_size)
    return None


def label(revision: CachedRevision) -> str:
    """'main (1a2b3c4d5e6f)'."""
    commit = revision.commit[:12]
    return f"{', '.join(revision.refs)} ({commit})" if revision.refs else commit


# ------------------------------------------------------------------------------------------------------ deletion


def delete(inventory: Inventory, selection: Selection) -> None:
    """Delete the files. Raises PacelineError where anything of it lies outside the caches (a link leads there), where
    another process is downloading it, and where something could not be deleted."""
    if selection.model.kind == "wheel":
        left = _delete_wheel(selection.model.folder, inventory.own_cache)
    elif not selection.revisions:  # nothing but an unfinished download
        left = _delete_folders([selection.model.folder], inventory.hub_cache)
    else:
        strategy = _strategy(inventory, selection)
        doomed = [*strategy.blobs, *strategy.refs, *strategy.repos, *strategy.snapshots]
        _check_inside(doomed, inventory.hub_cache)
        strategy.execute()
        left = [path for path in doomed if path.exists()]
    if left:
        raise PacelineError(f"{left[0]} could not be deleted: look at its owner and permissions")


def _delete_wheel(folder: Path, own_cache: Path) -> list[Path]:
    from filelock import FileLock, Timeout

    try:
        with FileLock(f"{folder}.lock", timeout=0):
            return _delete_folders(_wheel_folders(folder), own_cache)
    except Timeout:
        raise PacelineError(f"{folder.name} is being downloaded by another process: try again later") from None


def _delete_folders(folders: list[Path], cache: Path) -> list[Path]:
    """Returns those that are left."""
    _check_inside(folders, cache)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return [folder for folder in folders if folder.exists()]


def _check_inside(paths: Iterable[Path], cache: Path) -> None:
    root = cache.resolve()
    for path in paths:
        # A blob may be a link into the hub's store of shared ones: the link is deleted, so its own place counts.
        if (path.is_symlink() and path.is_dir()) or not (path.parent.resolve() / path.name).is_relative_to(root):
            raise PacelineError(f"{path} is a link that leads out of the cache {cache}: nothing was deleted")


def _strategy(inventory: Inventory, selection: Selection) -> DeleteCacheStrategy:
    info = _scan(inventory.hub_cache)
    assert info is not None, "a selection from the hub's cache, which is not there"
    # The hub's library finds a commit in any repository, and a copied repository has its origin's commits.
    alone = replace(info, repos=frozenset(repo for repo in info.repos if repo.repo_path == selection.model.folder))
    return alone.delete_revisions(*(revision.commit for revision in selection.revisions))
