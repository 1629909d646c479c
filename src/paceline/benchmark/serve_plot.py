"""The figure of `paceline bench serve`: how its latencies are spread, a line for each rate."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.benchmark.plot import save
from paceline.benchmark.serve import Report
from paceline.benchmark.serve_figures import Round, Slo


def plot(report: Report, path: str, version: str) -> None:
    """Write the figure; the suffix says its kind (png, svg, pdf), `version` is paceline's. Raises UsageError for a
    suffix that says none."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    slo = report.slo or Slo()
    bounds = {"TTFT": slo.ttft, "TPOT": slo.tpot, "ITL": None, "latency": slo.latency}
    figure, axes = pyplot.subplots(1, len(bounds), figsize=(3.4 * len(bounds), 3.4), sharey=True)
    for axis, (name, bound) in zip(axes, bounds.items(), strict=True):
        for one in report.rounds:
            values = sorted(_values(one, name))
            shares = [(index + 1) / len(values) for index in range(len(values))]
            axis.step([1e3 * value for value in values], shares, where="post", label=f"{one.rate:g} requests/s")
        if bound is not None:
            axis.axvline(1e3 * bound, color="black", linewidth=1, linestyle=":")
        axis.set_xlabel(f"{name}, ms")
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share at or below")
    axes[-1].legend(fontsize=7)
    work = report.workload
    figure.suptitle(
        f"{report.model}, {work.num_requests} requests of {work.input_len} + {work.output_len} tokens"
        f"{' on average' if work.mixed else ''}, paceline {version}'s client",
        fontsize=9,
    )
    save(figure, path)


def _values(one: Round, name: str) -> Sequence[float]:
    answered = [outcome for outcome in one.outcomes if outcome.error is None]
    if name == "ITL":
        return [gap for outcome in answered for gap in outcome.itl]
    found = [getattr(outcome, name.lower()) for outcome in answered]
    return [value for value in found if value is not None]
