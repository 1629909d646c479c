"""A group of commands whose unknown command is answered with the nearest known one."""

from __future__ import annotations

import click

from paceline.registry import nearest, unknown


class NearestGroup(click.Group):
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            hint = "" if nearest(name, self.commands) else self.hint(name)
            raise click.UsageError(unknown("command", name, self.commands) + hint, ctx)
        return super().resolve_command(ctx, args)

    def hint(self, name: str) -> str:
        """What else `name` may have been meant as, when no command is near it."""
        return ""
