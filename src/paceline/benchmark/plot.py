"""The figures of `paceline bench`: tokens a second of each engine, and the roof over each, per precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.benchmark import throughput
from paceline.benchmark.latency import Report, Row
from paceline.errors import UsageError

OURS, THEIRS = "#2266aa", "#999999"


def check_plot(path: str) -> None:
    """Raises UsageError where no figure can be drawn, before minutes are spent on measuring."""
    try:
        import matplotlib  # noqa: F401  # optional
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install matplotlib, or leave --plot out") from None
    if not Path(path).resolve().parent.is_dir():
        raise UsageError(f"--plot {path}: there is no such directory")


def plot(report: Report, path: str, version: str) -> None:
    """Write the figure; the suffix says its kind (png, svg, pdf), `version` is paceline's. Raises UsageError for a
    suffix that says none."""
    bars = [
        _Bar(_label(row), row.engine, row.tokens_per_second, report.roof / row.bytes_per_token) for row in report.rows
    ]
    _draw(bars, "one stream", f"{report.roof / 1e9:,.0f} GB/s over bytes a token", _title(report, version), path)


def plot_throughput(report: throughput.Report, path: str, version: str) -> None:
    """The same of many streams."""
    bars = []
    for row in report.rows:
        what = "offline" if row.batch is None else f"{row.batch} streams"
        bars.append(_Bar(f"{row.engine}, {row.weight_format}, {what}", row.engine, row.rate, row.roof_rate))
    roof = f"{report.bandwidth / 1e9:,.0f} GB/s and {report.operations / 1e12:,.0f} TFLOP/s"
    _draw(bars, "many streams", roof, _title(report, version), path)


def save(figure: Any, path: str) -> None:
    """Write a matplotlib figure and close it. Raises UsageError for a suffix that says no kind of file."""
    from matplotlib import pyplot

    figure.tight_layout()
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise UsageError(f"--plot {path}: {error}") from error
    finally:
        pyplot.close(figure)


@dataclass(frozen=True)
class _Bar:
    label: str
    engine: str
    rate: float
    roof: float


def _title(report: Report | throughput.Report, version: str) -> str:
    machine: Mapping[str, Any] = report.machine
    return f"{report.shape}, {report.dtype}, {machine['device']}, torch {machine['torch']}, paceline {version}"


def _draw(bars: Sequence[_Bar], streams: str, roof: str, title: str, path: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 1.4 + 0.42 * len(bars)))
    places = range(len(bars))
    widest = max(bar.roof for bar in bars)
    axis.barh(places, [bar.rate for bar in bars], color=[OURS if bar.engine == "paceline" else THEIRS for bar in bars])
    for place, bar in zip(places, bars, strict=True):
        axis.plot([bar.roof, bar.roof], [place - 0.4, place + 0.4], color="black", linewidth=1.5)
        inside = bar.rate > 0.1 * widest  # beyond its end a number would meet the line of the roof
        axis.annotate(
            f"{bar.rate:,.0f}",
            (bar.rate, place),
            (-4 if inside else 4, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            color="white" if inside else "black",
            fontsize=8,
        )
    axis.set_yticks(list(places), [bar.label for bar in bars], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"tokens/s of {streams}; the line is the roof: {roof}")
    axis.set_title(title, fontsize=9)
    save(figure, path)


def _label(row: Row) -> str:
    return f"{row.engine}, {row.weight_format}, prompt {row.context:,}"
