"""The documents name only what exists: links, files, commands and flags."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_exist(path):
    text = path.read_text()
    links = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    missing = [link for link in links if link and not (path.parent / link).exists()]
    for name in re.findall(r"`([\w./-]+\.(?:py|md|toml|txt))`", text):
        if not any((home / name).exists() for home in (ROOT, ROOT / "src" / "paceline")):
            missing.append(name)
    assert not missing, f"{path.name} names what is not there"


def blocks(text: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_readme_shows_only_flags_that_exist():
    from paceline.cli.app import commands

    shown = [line for block in blocks((ROOT / "README.md").read_text()) for line in block.splitlines()]
    lines = [line.split("paceline generate")[1].split("#")[0] for line in shown if "paceline generate" in line]
    assert lines
    flags = {flag for line in lines for flag in re.findall(r"--[\w-]+", line)}
    assert flags <= {name for option in commands.commands["generate"].params for name in option.opts}


@pytest.mark.parametrize("marker", ["run command", "test command"])
def test_each_of_the_two_commands_is_one_line(marker):
    """.ci/run takes the test command from here; a person takes both."""
    (block,) = re.findall(rf"<!-- {marker} -->\n```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(block.strip().splitlines()) == 1
    assert block.startswith("pip install -c constraints.txt")
