"""The figure: drawn where matplotlib is, refused by name where it is not."""

from __future__ import annotations

import sys

import pytest

from paceline.benchmark.latency import Options, run
from paceline.benchmark.plot import check_plot, plot
from paceline.errors import UsageError


def test_it_shows_every_row_and_its_roof(answer, tmp_path):
    pytest.importorskip("matplotlib")
    report = run(
        Options("llama-3.1-8b", ("dense", "int8"), against=("transformers",)),
        run_job=lambda job: answer(job, 123.0 if job.engine == "paceline" else 45.0),
    )
    path = tmp_path / "figure.svg"
    check_plot(str(path))
    plot(report, str(path), "9.8.7")
    text = path.read_text()
    # matplotlib draws text as glyphs, and notes what they say.
    for said in (
        "paceline, dense, prompt 32",
        "paceline, int8, prompt 32",
        "transformers static, dense, prompt 32",
        "123",
        "45",
        "paceline 9.8.7",
    ):
        assert f"<!-- {said} -->" in text or f" {said} -->" in text
    with pytest.raises(UsageError, match="'nothing' is not supported"):
        plot(report, str(tmp_path / "figure.nothing"), "9.8.7")


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="--plot needs matplotlib: pip install matplotlib"):
        check_plot(str(tmp_path / "figure.png"))


def test_a_directory_that_is_not_there(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match="no such directory"):
        check_plot(str(tmp_path / "missing" / "figure.png"))
