"""Models from the Hugging Face hub: its cache, token and offline rules, and quick to say when it is out of reach."""

from __future__ import annotations

import errno
import os
import socket
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from paceline.errors import DownloadError, ModelNotFoundError, PacelineError
from paceline.loading.progress import Progress

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

FILES = ["*.safetensors", "*.json", "*.jinja", "*.model"]
PICKLES = ["pytorch_model*.bin"]  # fetched only of a repository that has no safetensors
# Other layouts of the same weights: Meta's originals, Mistral's consolidated file, exports in folders of their own. A
# folder that begins with a digit (1_Pooling) is one of sentence-transformers' modules, and belongs to the model.
NOT_FILES = ["[!0-9]*/*.safetensors", "[!0-9]*/*.json", "[!0-9]*/*.model", "*/*.bin", "consolidated*"]
# Name look-up and connection together. A resolver without a network can take 5 s a try and more, and the hub's own
# client retries: 2.5 s is what a user without a network waits before the next road is taken.
PROBE_SECONDS = 2.5
ANSWER_SECONDS = 10.0  # for the first answer of a host that did accept a connection
LOCAL_WAYS = "without a network, give a local directory or a .gguf file"


@dataclass(frozen=True)
class Snapshot:
    path: Path
    revision: str
    note: str


def fetch_snapshot(
    repo: str,
    revision: str | None,
    token: str | None,
    download_dir: str | None,
    progress: Progress,
    patience: float = ANSWER_SECONDS,
) -> Snapshot:
    """The files of `repo` at `revision` (default: main), downloaded if they are not in the cache.

    Offline (HF_HUB_OFFLINE, or no answer to the first question within `patience` seconds) the cache alone is asked.
    Raises ModelNotFoundError if the hub has no such repository or revision, DownloadError for all other failures.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _cached(repo, revision, download_dir, "the hub is switched off by HF_HUB_OFFLINE")
    if not reachable(constants.ENDPOINT):
        return _cached(repo, revision, download_dir, f"{constants.ENDPOINT} does not answer")
    with _one_line_errors(repo, revision):
        info = _ask(repo, revision, token, patience)
        if isinstance(info, str):
            return _cached(repo, revision, download_dir, info)
        return _download(repo, revision, info, token, download_dir, progress)


@dataclass(frozen=True)
class HubDescription:
    """`config`: the path of config.json. `stored`: values of each safetensors dtype, by the headers of all files; {}
    where there are none, or the hub was not asked."""

    config: Path
    stored: Mapping[str, int]
    note: str


def fetch_description(repo: str, revision: str | None, token: str | None, download_dir: str | None) -> HubDescription:
    """config.json, and the headers of the weights: some kilobytes of each file, by range requests.

    Offline, config.json from the cache. Raises as fetch_snapshot.
    """
    from huggingface_hub import HfApi, constants, errors, hf_hub_download

    def config(cached: bool) -> Path:
        found = hf_hub_download(
            repo, "config.json", revision=revision, token=token, cache_dir=download_dir, local_files_only=cached
        )
        return Path(found)

    why = ""
    if constants.HF_HUB_OFFLINE:
        why = "the hub is switched off by HF_HUB_OFFLINE"
    elif not reachable(constants.ENDPOINT):
        why = f"{constants.ENDPOINT} does not answer"
    with _one_line_errors(repo, revision):
        info = why or _ask(repo, revision, token, ANSWER_SECONDS)
        if isinstance(info, str):
            try:
                path = config(cached=True)
            except errors.LocalEntryNotFoundError as error:
                raise DownloadError(f"'{repo}' is not in the cache and {info}; {LOCAL_WAYS}") from error
            return HubDescription(path, {}, f"config.json from the cache, as {info}")
        with _quiet_hub():
            path = config(cached=False)
        stored: dict[str, int] = {}
        # A repository without safetensors: config.json says enough.
        with suppress(errors.NotASafetensorsRepoError):
            found = HfApi(token=token).get_safetensors_metadata(repo, revision=info.sha)
            stored = {str(kind): count for kind, count in found.parameter_count.items()}
        headers = "config.json and headers" if stored else "config.json"
        return HubDescription(path, stored, f"{headers}, commit {(info.sha or 'main')[:12]}")


def reachable(endpoint: str, seconds: float = PROBE_SECONDS) -> bool:
    """True if the host of `endpoint`, or of the proxy that leads to it, accepts a connection in time."""
    url = urlsplit(endpoint)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=seconds).close()
        except (OSError, UnicodeError):  # UnicodeError: a host that is no domain name
            return
        answered.set()

    # A thread, because getaddrinfo() has no timeout of its own; a daemon, because it cannot be stopped.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def _cached(repo: str, revision: str | None, download_dir: str | None, why: str) -> Snapshot:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    def find(patterns: list[str]) -> Path:
        found = snapshot_download(
            repo,
            revision=revision,
            cache_dir=download_dir,
            local_files_only=True,
            allow_patterns=patterns,
            ignore_patterns=NOT_FILES,
        )
        return Path(found)

    try:
        path = find(FILES)
        if not any(path.glob("*.safetensors")):
            path = find(FILES + PICKLES)
    except HFValidationError as error:
        raise ModelNotFoundError(f"'{repo}' is not a hub id ({_first_line(error)})") from error
    except Exception as error:  # several types, which differ between versions of huggingface_hub
        raise DownloadError(f"'{repo}' is not in the cache and {why}; {LOCAL_WAYS}") from error
    # Older versions of huggingface_hub give a snapshot that holds only some of the files; newer ones raise above.
    weights = any(any(path.glob(pattern)) for pattern in ("*.safetensors", *PICKLES))
    if not weights or not (path / "config.json").exists():
        raise DownloadError(f"the cache holds only a part of '{repo}' and {why}; {LOCAL_WAYS}")
    return Snapshot(path, path.name, f"commit {path.name[:12]} from the cache, as {why}")


def _ask(repo: str, revision: str | None, token: str | None, patience: float) -> ModelInfo | str:
    """What the hub says of the repository: its commit and files; or one line why it said nothing."""
    from huggingface_hub import HfApi, errors

    refusals = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
    try:
        return HfApi(token=token).model_info(repo, revision=revision, files_metadata=True, timeout=patience)
    except refusals:  # a GatedRepoError is a RepositoryNotFoundError
        raise
    except Exception as error:  # time-outs, TLS, status 5xx: the types are the HTTP client's, requests or httpx
        return f"the hub failed ({_first_line(error)})"


def _download(
    repo: str, revision: str | None, info: ModelInfo, token: str | None, download_dir: str | None, progress: Progress
) -> Snapshot:
    from huggingface_hub import constants, snapshot_download

    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    patterns = FILES
    if not any(_matches(name, ["*.safetensors"]) and not _matches(name, NOT_FILES) for name in sizes):
        patterns = FILES + PICKLES
    total = sum(size for name, size in sizes.items() if _matches(name, patterns) and not _matches(name, NOT_FILES))
    blobs = Path(download_dir or constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "blobs"
    with _watched(blobs, repo, total, progress), _quiet_hub():
        path = snapshot_download(
            repo,
            revision=revision,  # not the commit: the cache then knows which one the name led to, also offline
            token=token,
            cache_dir=download_dir,
            allow_patterns=patterns,
            ignore_patterns=NOT_FILES,
        )
    commit = Path(path).name
    return Snapshot(Path(path), commit, f"commit {commit[:12]}")


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


@contextmanager
def _watched(blobs: Path, label: str, total: int, progress: Progress) -> Iterator[None]:
    """Report the growth of the cache's folder: the hub's own bars differ between its versions, the folder does not."""
    stop = threading.Event()

    def watch() -> None:
        seen = 0
        while not stop.wait(0.2):
            now = min(folder_bytes(blobs), total)
            if now > seen:
                progress.advance(now - seen)
                seen = now

    progress.start(label, total)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        progress.done()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`; files that vanish meanwhile count nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


@contextmanager
def _quiet_hub() -> Iterator[None]:
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _one_line_errors(repo: str, revision: str | None) -> Iterator[None]:
    """The hub library's errors, and those of the HTTP client below it (requests or httpx, by its version), as ours."""
    from huggingface_hub import errors

    at = f" at revision '{revision}'" if revision else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"'{repo}' is gated: accept its licence at https://huggingface.co/{repo}, then set HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise ModelNotFoundError(
            f"'{repo}'{at} is not on the hub, or is private: check the spelling, or set HF_TOKEN"
        ) from error
    except PacelineError:
        raise
    except OSError as error:
        raise disk_or_network(f"'{repo}'", error) from error
    except Exception as error:
        raise DownloadError(f"downloading '{repo}'{at} failed ({_first_line(error)}); try again") from error


def disk_or_network(what: str, error: OSError) -> DownloadError:
    """The DownloadError of an OSError: a full disk is said as such."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(f"no disk space left while fetching {what}: free some, or set PACELINE_CACHE elsewhere")
    return DownloadError(f"fetching {what} failed ({_first_line(error)}); try again")


def _first_line(error: Any) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
