"""Results as tables on a terminal."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from qsdpa_patch.bench.limits import DeviceLimits
from qsdpa_patch.bench.measurement import DEQUANTIZED, Measurement
from qsdpa_patch.bench.results import BenchmarkRun, CaseResult, PathResult

__all__ = ["print_results"]

_LARGEST_DIFFERENCE = 0.02
"""Twice what bfloat16 may cost a kernel, since the path compared with rounds too."""


def print_results(run: BenchmarkRun, console: Console) -> None:
    """Print a table for each suite and shape, then what failed and why."""
    machine = run.machine
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB" if machine["memory_bytes"] else ""
    console.print(f"{machine['device_name']} ({machine['device']}{memory}), {versions}", highlight=False)
    for (suite, label), results in itertools.groupby(run.results, lambda r: (r.case.suite, r.case.label)):
        console.print()
        console.print(_table(f"{suite}: {label}", list(results), run.limits))
    console.print(
        "\nTimes: median per call, and the distance between the quartiles in % of it. Host: of the time, what passes "
        "before the result is waited for. Speed-up: of qsdpa_patch over the path. GB/s: keys and values read. Of "
        f"limit: the least time for reading them and for the multiply-adds, over the time; here {run.limits}. "
        "Memory: the most held in a call, above the inputs.",
        style="dim",
        highlight=False,
    )
    _print_reasons(run, console)


def _table(title: str, results: list[CaseResult], limits: DeviceLimits) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("keys, path", no_wrap=True)
    with_host = any(path.host for result in results for path in result.paths)
    host = ("host",) if with_host else ()
    for heading in ("median", "spread", "runs", *host, "speed-up", "GB/s", "of limit", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(f"{result.case.context}")
        for path in result.paths:
            table.add_row(*_cells(path, limits, with_host=with_host))
    return table


def _cells(path: PathResult, limits: DeviceLimits, *, with_host: bool) -> list[str]:
    measurement, summary = path.measurement, path.summary
    rate, of_limit = path.bytes_per_second, path.of_limit(limits)
    name = f"  {measurement.name}" + (f" ({measurement.route})" if measurement.route else "")
    if summary is None:
        return [name, "fails"]
    runs = f"{summary.runs}x{measurement.calls_per_run}" if measurement.calls_per_run > 1 else f"{summary.runs}"
    return [
        name,
        _duration(summary.median),
        f"{summary.spread:.0%}" if summary.runs > 1 else "",
        runs,
        *((_duration(path.host.median) if path.host else "",) if with_host else ()),
        f"{path.slower_than_ours:.2f}x" if path.slower_than_ours is not None else "",
        f"{rate / 1e9:.1f}" if rate is not None else "",
        f"{of_limit:.0%}" if of_limit is not None else "",
        _size(measurement.peak_bytes),
    ]


def _print_reasons(run: BenchmarkRun, console: Console) -> None:
    """Each failure, and each reason why a call of ours was not fused, once for all contexts."""
    reasons: dict[str, str] = {}
    for measurement in (path.measurement for result in run.results for path in result.paths):
        for reason in _reasons(measurement):
            reasons.setdefault(re.sub(r"\d+", "#", reason), reason)
    for reason in reasons.values():
        console.print(reason, highlight=False, markup=False, soft_wrap=True)


def _reasons(measurement: Measurement) -> Iterator[str]:
    name, difference = measurement.name, measurement.difference
    if difference is not None and not difference <= _LARGEST_DIFFERENCE:
        yield f"WRONG: {name} differs from {DEQUANTIZED} by {difference:.1%}"
    if measurement.error:
        yield f"{name} fails: {measurement.error}"
    elif measurement.reason:
        yield f"{name} took the route {measurement.route}: {measurement.reason}"


def _duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:.0f} {unit}"
    return f"{seconds / 1e-6:.1f} us"


def _size(nbytes: int | None) -> str:
    if nbytes is None:
        return ""
    return f"{nbytes / 1e6:.1f} MB"
