"""Any transformer made faster by one line: see fusion/optimize.py."""

from paceline.fusion.optimize import optimize, report, restore
from paceline.fusion.report import Report
from paceline.fusion.stages import Stage, measure_stages

__all__ = ["Report", "Stage", "measure_stages", "optimize", "report", "restore"]
