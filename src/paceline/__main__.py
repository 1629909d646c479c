"""`python -m paceline`: the command line, for a checkout that is on the path but not installed."""

from __future__ import annotations

import sys

from paceline.cli import main

sys.exit(main())
