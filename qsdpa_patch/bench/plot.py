"""Results as a picture."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from qsdpa_patch.bench.results import BenchmarkRun, CaseResult

__all__ = ["PlotError", "load_pyplot", "write_plot"]


class PlotError(Exception):
    """Plots cannot be drawn here. The message says what to install."""


def load_pyplot() -> Any:
    """Matplotlib's pyplot, set up to draw without a display.

    Raises:
        PlotError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise PlotError("--plot needs matplotlib: pip install 'qsdpa-patch[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def write_plot(run: BenchmarkRun, path: Path) -> None:
    """One panel for each suite and shape: time per call over the context, quartiles as bars."""
    plt = load_pyplot()
    groups = [
        (f"{suite}: {label}", list(results))
        for (suite, label), results in itertools.groupby(run.results, lambda r: (r.case.suite, r.case.label))
    ]
    figure, axes = plt.subplots(len(groups), 1, figsize=(8, 4.5 * len(groups)), squeeze=False, layout="constrained")
    for axis, (title, results) in zip(axes[:, 0], groups):
        _draw(axis, results)
        axis.set_title(title, fontsize="medium")
    versions = ", ".join(f"{name} {number}" for name, number in run.machine["versions"].items())
    figure.suptitle(f"{run.machine['device_name']} ({run.machine['device']}), {versions}", fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(axis: Any, results: list[CaseResult]) -> None:
    names = dict.fromkeys(path.measurement.name for result in results for path in result.paths)
    for name in names:
        points = [
            (result.case.context, path.summary)
            for result in results
            for path in result.paths
            if path.measurement.name == name and path.summary is not None
        ]
        if not points:
            continue
        contexts = [context for context, _ in points]
        medians = [1e3 * summary.median for _, summary in points]
        below = [1e3 * (summary.median - summary.lower_quartile) for _, summary in points]
        above = [1e3 * (summary.upper_quartile - summary.median) for _, summary in points]
        axis.errorbar(contexts, medians, yerr=(below, above), marker="o", capsize=3, label=name)
    contexts = sorted({result.case.context for result in results})
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [str(context) for context in contexts])
    axis.set_yscale("log")
    axis.set_xlabel("keys in the cache")
    axis.set_ylabel("milliseconds per call")
    axis.grid(visible=True, which="both", alpha=0.3)
    if names:
        axis.legend()
