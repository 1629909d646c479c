"""The version, for what the server tells of itself. The one module here that imports the package's face."""

from __future__ import annotations

from paceline import __version__

VERSION = __version__
