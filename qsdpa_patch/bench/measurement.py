"""Timing several paths side by side: one run of each in turn, so that a slow spell of the machine hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

import qsdpa_patch
from qsdpa_patch.bench.limits import Work

__all__ = ["DEQUANTIZED", "OURS", "Measurement", "TimedPath", "measure"]

OURS = "qsdpa_patch"
"""The name of the path that the others are compared with."""
DEQUANTIZED = "dequantize + SDPA"
"""The name of the path whose result ours must agree with: the same call, by other code."""

_MIN_RUNS = 3
_MAX_RUNS = 1000
_SLOW_SECONDS = 5.0
"""A path that has had so much time, and ten times its share, needs no further runs."""
_LONG_SECONDS = 0.5
"""Calls that take so long are timed one by one: what a run of several hides is nothing beside it."""


@dataclass(frozen=True)
class TimedPath:
    """One way to do the work.

    run: starts the work so many times, each after the other, and returns what to evaluate for it to be done, in any
        form that :func:`mlx.core.eval` takes; ``None`` where it is done already.
    work: the least that one call has to do, where that is known.
    context: entered around every run, outside the timing (to switch the patch on, say).
    prepare: called once before the first run, in the context.
    """

    name: str
    run: Callable[[int], Any]
    work: Work | None = None
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    prepare: Callable[[], None] = lambda: None


@dataclass
class Measurement:
    """What was measured of one path.

    samples: seconds per call, one for each run of ``calls_per_run`` calls.
    host_samples: on a GPU, the part of them that passed before the last result was waited for:
        building graphs and submitting them.
    peak_bytes: most memory that MLX held during one call, above what was there before.
    route, reason: what the report counted: the route through qsdpa_patch and, unless fused, why.
    difference: of our result from that of :data:`DEQUANTIZED` on the same inputs, the largest over the largest
        magnitude.
    error: why the path cannot be run; the other numbers are missing then.
    """

    name: str
    calls_per_run: int
    work: Work | None = None
    samples: list[float] = field(default_factory=list)
    host_samples: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    route: str = ""
    reason: str = ""
    difference: float | None = None
    error: str = ""


def measure(paths: Sequence[TimedPath], *, seconds: float, calls: int) -> list[Measurement]:
    """Time ``paths``, in turns, until each has had ``seconds`` and three runs, or ten times that and five seconds.

    The first call and the first run of a path, which may compile kernels, are not counted. A path that raises is left
    out from there on.

    Args:
        paths: what to time.
        seconds: of measuring time for each path.
        calls: per run, one after another, as the layers of a model are; 1 for a path whose calls take half a second.
            A run of many hides the cost of waking sleeping cores and of waiting for a result.
    """
    measurements = [Measurement(path.name, calls, path.work) for path in paths]
    outputs = {path.name: _attempt(_warm_up, path, measurement) for path, measurement in zip(paths, measurements)}
    ours, wanted = outputs.pop(OURS, None), outputs.pop(DEQUANTIZED, None)
    if isinstance(ours, mx.array) and isinstance(wanted, mx.array):
        next(m for m in measurements if m.name == OURS).difference = _difference(ours, wanted)
    active = [pair for pair in zip(paths, measurements) if not pair[1].error]
    while active:
        for path, measurement in active:
            _attempt(_sample, path, measurement)
        active = [pair for pair in active if not _is_done(pair[1], seconds)]
    return measurements


def _attempt(step: Callable[[TimedPath, Measurement], Any], path: TimedPath, measurement: Measurement) -> Any:
    """Take a step of one path; whatever it raises becomes its result."""
    try:
        with path.context():
            return step(path, measurement)
    except Exception as error:
        measurement.error = f"{type(error).__name__}: {error}".strip()
        measurement.samples.clear()
        measurement.host_samples.clear()
        return None


def _warm_up(path: TimedPath, measurement: Measurement) -> Any:
    """Run one call, note its memory and its route, then, if a run has several, a whole run; the call's result."""
    path.prepare()
    qsdpa_patch.reset_report()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    output, elapsed = _timed_call(path)
    measurement.peak_bytes = max(0, mx.get_peak_memory() - before)
    rows = [row for row in qsdpa_patch.report().rows if row.route != "stock"]
    if rows:
        row = max(rows, key=lambda row: row.calls)
        measurement.route, measurement.reason = row.route, row.reason
    if elapsed >= _LONG_SECONDS and measurement.calls_per_run > 1 and _timed_call(path)[1] >= _LONG_SECONDS:
        measurement.calls_per_run = 1  # the second call compiled nothing
    if measurement.calls_per_run > 1:
        mx.eval(path.run(measurement.calls_per_run))
    return output


def _timed_call(path: TimedPath) -> tuple[Any, float]:
    """The result of one call, and seconds."""
    start = time.perf_counter()
    output = path.run(1)
    mx.eval(output)
    return output, time.perf_counter() - start


def _difference(found: mx.array, wanted: mx.array) -> float:
    found, wanted = found.astype(mx.float32), wanted.astype(mx.float32)
    ratio: Any = (mx.abs(found - wanted).max() / mx.abs(wanted).max()).item()
    return float(ratio)


def _sample(path: TimedPath, measurement: Measurement) -> None:
    start = time.perf_counter()
    output = path.run(measurement.calls_per_run)
    built = time.perf_counter()
    mx.eval(output)
    done = time.perf_counter()
    measurement.samples.append((done - start) / measurement.calls_per_run)
    if output is not None and mx.default_device().type == mx.DeviceType.gpu:
        measurement.host_samples.append((built - start) / measurement.calls_per_run)


def _is_done(measurement: Measurement, seconds: float) -> bool:
    runs = len(measurement.samples)
    elapsed = sum(measurement.samples) * measurement.calls_per_run
    enough = runs >= _MIN_RUNS or elapsed >= max(_SLOW_SECONDS, 10 * seconds)
    return bool(measurement.error) or runs >= _MAX_RUNS or (enough and elapsed >= seconds)
