"""The command line. Every module here imports without torch; a command pays for it when it runs."""

from paceline.cli.app import main

__all__ = ["main"]
