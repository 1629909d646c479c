"""The figure of `paceline optimize --bench`: milliseconds a call, a group of bars for each shape."""

from __future__ import annotations

from paceline.benchmark.optimized import PACELINE, Report
from paceline.benchmark.plot import OURS, save

GREYS = ("#bbbbbb", "#999999", "#777777", "#555555")


def plot(report: Report, what: str, path: str, version: str) -> None:
    """Write the figure; the suffix says its kind. Times are on a logarithmic axis. Raises UsageError for a suffix that
    says none."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    engines = list(dict.fromkeys(row.engine for row in report.rows))
    shapes = list(dict.fromkeys((row.batch, row.length) for row in report.rows))
    times = {(row.engine, row.batch, row.length): row.milliseconds for row in report.rows}
    figure, axis = pyplot.subplots(figsize=(8, 4))
    width = 0.8 / len(engines)
    for index, engine in enumerate(engines):
        values = [times[engine, batch, length] for batch, length in shapes]
        places = [place + (index - (len(engines) - 1) / 2) * width for place in range(len(shapes))]
        color = OURS if engine == PACELINE else GREYS[index % len(GREYS)]
        bars = axis.bar(places, values, width * 0.95, label=engine, color=color)
        axis.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=7, padding=2)
    axis.set_yscale("log")
    axis.set_xticks(range(len(shapes)), [f"{batch}x{length}" for batch, length in shapes])
    axis.set_xlabel("batch x length")
    axis.set_ylabel("ms a call")
    axis.legend(fontsize=8)
    axis.set_title(f"{what}, {report.where}, paceline {version}", fontsize=9)
    save(figure, path)
