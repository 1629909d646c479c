"""Any transformer made faster by one line: see fusion/optimize.py."""

from paceline.fusion.optimize import optimize, restore
from paceline.fusion.report import Report, report

__all__ = ["Report", "optimize", "report", "restore"]
