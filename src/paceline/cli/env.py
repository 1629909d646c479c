"""`paceline env`: this machine, what is installed on it, and what paceline chooses here and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from paceline.cli.options import configure_logging, debug_option
from paceline.cli.table import columns
from paceline.sizing import gib


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.option("--measure", is_flag=True, help="Measure how fast each device reads its memory (0.2 s each).")
@debug_option
def env(as_json: bool, measure: bool, debug: bool) -> None:
    """Show versions, the CPU, memory, devices, and what is chosen here and why: for a bug report.

    Secrets are never shown, only whether they are set. A torch or a driver that is broken is told, not tripped over.
    """
    configure_logging(debug)
    from paceline.cli.env_facts import read_facts

    facts = read_facts(measure=measure)
    click.echo(json.dumps(facts, ensure_ascii=False) if as_json else as_text(facts))


def as_text(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """The sections, each a title and its facts in two columns; a list takes a line an entry."""
    parts = []
    for title, section in facts.items():
        rows = [row for name, value in section.items() for row in _rows(name, value)]
        parts.append(f"{title}\n{columns(rows or [('none', '')])}")
    return "\n\n".join(parts)


def _rows(name: str, value: Any) -> list[tuple[str, str]]:
    label = _label(name)
    if isinstance(value, list):
        return [(label if index == 0 else "", str(entry)) for index, entry in enumerate(value)]
    return [(label, _text(name, value))]


def _label(name: str) -> str:
    """'total_bytes' -> 'total'; variables keep their names."""
    if name.isupper():
        return name
    return name.removesuffix("_bytes_per_second").removesuffix("_bytes").replace("_", " ")


def _text(name: str, value: Any) -> str:
    if value is None:
        return "not known" if name in ("model", "cores", "threads") else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{_label(key)} {_text(key, entry)}" for key, entry in value.items())
    if name.endswith("_bytes"):
        return gib(value)
    return f"{value / 1e9:.1f} GB/s" if name.endswith("_bytes_per_second") else str(value)
