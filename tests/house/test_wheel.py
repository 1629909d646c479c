"""What is shipped: pure Python, small, complete."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=60,
    )
    (path,) = folder.iterdir()
    assert path.name.endswith("-py3-none-any.whl"), "the wheel must run on every platform"
    assert path.stat().st_size < 1_000_000
    return zipfile.ZipFile(path)


PARTS = (".py", ".json")  # modules, and tables of tuned launches


def test_it_holds_the_package_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*") if path.suffix in PARTS}
    assert names == sources | {"paceline/py.typed"}


def test_it_says_what_it_is(wheel):
    from paceline import __version__

    (metadata,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    text = wheel.read(metadata).decode()
    assert f"\nVersion: {__version__}\n" in text
    assert "\nRequires-Python: >=3.10\n" in text
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "paceline = paceline.cli:main" in wheel.read(entry_points).decode()
