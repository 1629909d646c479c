"""The figure of `paceline bench latency`: tokens a second of each engine, and the roof over each, per precision."""

from __future__ import annotations

from pathlib import Path

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
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = list(report.rows)
    figure, axis = pyplot.subplots(figsize=(8, 1.4 + 0.42 * len(rows)))
    places = range(len(rows))
    rates = [row.tokens_per_second for row in rows]
    colors = [OURS if row.engine == "paceline" else THEIRS for row in rows]
    axis.barh(places, rates, color=colors)
    for place, row in zip(places, rows, strict=True):
        roof = report.roof / row.bytes_per_token
        axis.plot([roof, roof], [place - 0.4, place + 0.4], color="black", linewidth=1.5)
        axis.text(row.tokens_per_second, place, f" {row.tokens_per_second:,.0f}", va="center", fontsize=8)
    axis.set_yticks(list(places), [_label(row) for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"tokens/s of one stream; the line is the roof: {report.roof / 1e9:,.0f} GB/s over bytes a token")
    versions = f"torch {report.machine['torch']}, paceline {version}"
    axis.set_title(f"{report.shape}, {report.dtype}, {report.machine['device']}, {versions}", fontsize=9)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise UsageError(f"--plot {path}: {error}") from error
    finally:
        pyplot.close(figure)


def _label(row: Row) -> str:
    return f"{row.engine}, {row.weight_format}, {row.context:,}"
