"""`paceline models`: the aliases, what lies on this disk, where, and how to fetch and delete it."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import click

from paceline.cli.group import NearestGroup
from paceline.cli.options import configure_logging, debug_option
from paceline.cli.table import columns, size
from paceline.errors import ModelNotFoundError, UsageError
from paceline.loading.aliases import ALIASES, DEFAULT_MODEL

if TYPE_CHECKING:
    from paceline.loading.inventory import CachedModel, Inventory, Selection


@click.group(cls=NearestGroup, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the tables.")
@debug_option
@click.pass_context
def models(context: click.Context, /, as_json: bool, debug: bool) -> None:
    """List the short names (aliases) and the models on this disk, with their sizes.

    These are the Hugging Face hub's cache, shared with every program that uses it, and paceline's own.
    """
    configure_logging(debug)
    if context.invoked_subcommand is not None:
        if as_json:
            raise UsageError(f"--json is for the list: leave it out before '{context.invoked_subcommand}'")
        return
    from paceline.loading.inventory import take_inventory

    inventory = take_inventory()
    click.echo(json.dumps(_as_json(inventory), ensure_ascii=False) if as_json else _as_text(inventory))


@models.command()
@click.argument("name", metavar="NAME")
@debug_option
def path(name: str, debug: bool) -> None:
    """Print where NAME lies on this disk: an alias, a hub id (org/name or org/name@revision) or a wheel."""
    configure_logging(debug)
    from paceline.loading.inventory import label, select, take_inventory

    # In the order in which a name is resolved: an alias's wheel, once it is here, comes before the hub.
    found = sorted(select(take_inventory(), name), key=lambda selection: selection.model.kind != "wheel")
    found = [selection for selection in found if selection.revisions]
    if not found:
        raise ModelNotFoundError(f"'{name}' is only half downloaded: paceline models pull {name} finishes it")
    revisions = found[0].revisions
    chosen = [revision for revision in revisions if "main" in revision.refs] or revisions
    if len(chosen) > 1:
        model = found[0].model.name
        listed = ", ".join(label(revision) for revision in revisions)
        raise ModelNotFoundError(f"'{name}' has several revisions here ({listed}): name one, as in {model}@REVISION")
    click.echo(str(chosen[0].path))


@models.command()
@click.argument("name", metavar="NAME")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")
@click.option("--quiet", is_flag=True, help="No progress.")
@debug_option
def pull(name: str, revision: str | None, quiet: bool, debug: bool) -> None:
    """Fetch NAME if it is not here yet, and print where it lies: an alias or a hub id (org/name[@revision])."""
    configure_logging(debug)
    from paceline.cli.progress import terminal_progress
    from paceline.loading.resolve import resolve

    source = resolve(name, revision=revision, progress=terminal_progress(quiet))
    if source.note and not quiet:
        click.echo(source.note, err=True)
    click.echo(str(source.path))


@models.command()
@click.argument("name", metavar="NAME")
@click.option("--yes", is_flag=True, help="Do not ask.")
@debug_option
def delete(name: str, yes: bool, debug: bool) -> None:
    """Delete NAME from this disk: an alias (its files from the hub and its wheel), a hub id with all its revisions,
    or org/name@revision for one of them."""
    configure_logging(debug)
    from paceline.loading.inventory import delete as delete_selection
    from paceline.loading.inventory import select, take_inventory

    inventory = take_inventory()
    selections = select(inventory, name)
    click.echo(columns([_selection_row(selection) for selection in selections]), err=True)
    total = size(sum(selection.nbytes for selection in selections))
    if not yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise UsageError(f"nobody to ask whether to delete {total}: add --yes")
        if not click.confirm(f"Delete this and free {total}?", err=True):
            click.echo("nothing was deleted", err=True)
            return
    for selection in selections:
        delete_selection(inventory, selection)
    click.echo(f"{total} freed")


def _selection_row(selection: Selection) -> list[str]:
    from paceline.loading.inventory import label

    revisions = ", ".join(label(revision) for revision in selection.revisions if revision.commit)
    return [selection.model.name, selection.model.kind, size(selection.nbytes), revisions]


# --------------------------------------------------------------------------------------------------- the listing


def _as_text(inventory: Inventory) -> str:
    here = {model.name for model in inventory.models if model.revisions}
    parts = ["aliases", columns([_alias_row(name, here) for name in ALIASES]), "", "on this disk"]
    if inventory.models:
        parts.append(columns([row for model in inventory.models for row in _model_rows(model)]))
    parts.append(f"  {size(sum(model.nbytes for model in inventory.models))} in all")
    parts += [f"  warning: {warning}" for warning in inventory.warnings]
    parts += [
        "",
        columns([("hub cache", str(inventory.hub_cache)), ("own cache", str(inventory.own_cache))], indent=""),
    ]
    return "\n".join(parts)


def _alias_row(name: str, here: set[str]) -> list[str]:
    alias = ALIASES[name]
    wheel = "" if alias.wheel is None else f"or the wheel {alias.wheel.requirement}"
    is_here = alias.hub_id in here or (alias.wheel is not None and alias.wheel.requirement in here)
    notes = [*(["the default"] if name == DEFAULT_MODEL else []), *(["here"] if is_here else [])]
    return [name, alias.hub_id, wheel, ", ".join(notes)]


def _model_rows(model: CachedModel) -> list[list[str]]:
    """The model, and a line for each revision where there are several."""
    from paceline.loading.inventory import label

    revisions = model.revisions
    if len(revisions) == 1:
        about = label(revisions[0])
    else:
        about = f"{len(revisions)} revisions" if revisions else "unfinished download"
    used = datetime.fromtimestamp(model.last_used, timezone.utc).date().isoformat() if model.last_used else ""
    first = [model.name, model.kind, size(model.nbytes), f"used {used}" if used else "", about]
    if len(revisions) < 2:
        return [first]
    return [first, *(["", "", size(revision.nbytes), "", label(revision)] for revision in revisions)]


def _as_json(inventory: Inventory) -> dict[str, Any]:
    return {
        "aliases": [
            {"name": name, "hub_id": alias.hub_id, "wheel": alias.wheel and alias.wheel.requirement}
            for name, alias in ALIASES.items()
        ],
        "models": [
            {
                "name": model.name,
                "kind": model.kind,
                "bytes": model.nbytes,
                "last_used": model.last_used or None,
                "revisions": [
                    {"commit": found.commit or None, "refs": found.refs, "bytes": found.nbytes, "path": str(found.path)}
                    for found in model.revisions
                ],
            }
            for model in inventory.models
        ],
        "bytes": sum(model.nbytes for model in inventory.models),
        "warnings": inventory.warnings,
        "hub_cache": str(inventory.hub_cache),
        "own_cache": str(inventory.own_cache),
    }
