"""Logging: one logger a module, under 'paceline'. The library never configures handlers; the command line does."""

from __future__ import annotations

import logging


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: `log = get_logger(__name__)`."""
    return logging.getLogger(name)
